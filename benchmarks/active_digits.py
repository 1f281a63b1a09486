"""The table of docs/active_learning.md, from the results of `lightning-uq active`:

    lightning-uq active --score random,predictive_entropy,mutual_information,epig,badge,core_set,density_then_entropy@ddu,log_density@ddu \
        --out runs/active
    python benchmarks/active_digits.py runs/active/results.json

It keeps the results as benchmarks/active_digits.json, from which the site draws its figure.
"""

import json
import sys
from pathlib import Path

from lightning_uq.compare.active import COLUMNS
from lightning_uq.report import markdown_table
from lightning_uq.writing import replacing

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "active_learning.md"
BEGIN, END = "<!-- digits -->\n", "<!-- end of digits -->"


def table(results: dict) -> str:
    """What the page shows of results."""
    rows = results["rows"]
    columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
    lines = [line for line in markdown_table(rows, columns=columns).splitlines() if line.startswith("|")]
    return "\n" + "\n".join(lines) + "\n\n"


def publish(path: Path) -> None:
    """Keep results, and rewrite the page."""
    results = json.loads(path.read_text())
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    for file, content in ((RESULTS, json.dumps(results) + "\n"), (PAGE, before + table(results) + after)):
        with replacing(file) as partial:
            partial.write_text(content)


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
