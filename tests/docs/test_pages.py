"""Run the Python of every page, block after block.

A comment above a block says why it is not run, or which package it needs::

    <!-- not run: `model` is yours -->
    <!-- needs netcal -->
"""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- (not run: .+?|needs \w+) -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Pages that another test runs, mostly with more to check.
ELSEWHERE = {
    "after_training": "tests/test_after_training_page.py",
    "alarm": "tests/test_alarm_page.py",
    "clients": "tests/clients/conftest.py",
    "ddu": "tests/test_ddu_page.py",
    "density": "tests/test_density_page.py",
    "export": "tests/contract/test_compile_export.py",
    "laplace": "tests/test_laplace_page.py",
    "predictions": "tests/test_predictions_page.py",
    "subclassing": "tests/test_subclassing_page.py",
    "tasks": "tests/test_tasks_page.py",
    "users_modules": "tests/test_users_modules_page.py",
}
PAGES = [
    path.relative_to(ROOT / "docs").as_posix()
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if BLOCK.search(path.read_text()) and path.relative_to(ROOT / "docs").with_suffix("").as_posix() not in ELSEWHERE
]
OUTPUT = re.compile(
    r"\n[^\n`]+:\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE
)  # after a sentence that introduces it


def skeleton(text: str) -> list[str]:
    """Lines without the frames of tables, with one space between words and # in place of numbers."""
    lines = (re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", re.sub(r"[│|]", " ", line)) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs_after_the_one_before(page, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "page"}
    text = (ROOT / "docs" / page).read_text()
    for found in BLOCK.finditer(text):
        condition = found[1] or ""
        if condition.startswith("not run") or (
            condition.startswith("needs") and importlib.util.find_spec(condition.split()[1]) is None
        ):
            continue
        line = text[: found.start(2)].count("\n")
        exec(compile("\n" * line + found[2], page, "exec"), names)  # an error shows the page's line
        printed = skeleton(capsys.readouterr().out)
        if shown := OUTPUT.match(text, found.end() + 1):
            assert not [line for line in skeleton(shown[1]) if line not in printed], printed


def test_the_other_pages_are_run_elsewhere():
    for page, test in ELSEWHERE.items():
        assert (ROOT / "docs" / f"{page}.md").exists()
        assert page in (ROOT / test).read_text()


def test_no_block_is_missed():
    """A fence that is indented, or in capitals, would not be run."""
    for page in (ROOT / "docs").rglob("*.md"):
        if page.relative_to(ROOT / "docs").with_suffix("").as_posix() not in ELSEWHERE:
            text = page.read_text()
            fences = re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", text, flags=re.MULTILINE | re.IGNORECASE)
            assert len(fences) == len(BLOCK.findall(text)), page
