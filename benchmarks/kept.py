"""Results that are kept beside a script, and the table of a page that shows them."""

import json
from collections.abc import Callable
from pathlib import Path

from lightning_uq.writing import replacing


def publish(found: Path, kept: Path, page: Path, table: Callable[[dict], str], begin: str, end: str) -> None:
    """Keep results, and rewrite the table between two marks of a page.

    Args:
        found: The results.
        kept: Where they are kept.
        page: The page.
        table: Makes the table.
        begin: The mark before it.
        end: The mark after it.
    """
    results = json.loads(found.read_text())
    text = page.read_text()
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    for file, content in ((kept, json.dumps(results) + "\n"), (page, before + table(results) + after)):
        with replacing(file) as partial:
            partial.write_text(content)
