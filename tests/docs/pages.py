"""The Python of a page, block after block, in one namespace.

A comment above a block says why it is not run, or which package it needs::

    <!-- not run: `model` is yours -->
    <!-- needs netcal -->
"""

import importlib.util
import logging
import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:<!-- (not run: .+?|needs \w+) -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(
    r"\n[^\n`]+:\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE
)  # after a sentence that introduces it


def skeleton(text: str) -> list[str]:
    """Lines without the frames of tables, with one space between words and # in place of numbers."""
    lines = (re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", re.sub(r"[│|]", " ", line)) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines]


def run_page(page: str, tmp_path: Path, monkeypatch, capsys) -> set[str]:
    """Run the blocks of a page and compare what they print with what it shows; return the packages that are missing."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "page"}
    missing = set()
    text = (DOCS / page).read_text()
    for found in BLOCK.finditer(text):
        condition, _, package = (found[1] or "").partition(" ")
        if condition == "needs" and importlib.util.find_spec(package) is None:
            missing.add(package)
        if condition == "not" or package in missing:
            continue
        line = text[: found.start(2)].count("\n")
        exec(compile("\n" * line + found[2], page, "exec"), names)  # an error shows the page's line
        printed = skeleton(capsys.readouterr().out)
        if shown := OUTPUT.match(text, found.end() + 1):
            assert not [line for line in skeleton(shown[1]) if line not in printed], printed
    return missing
