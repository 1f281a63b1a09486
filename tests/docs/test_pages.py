"""Run the Python of every page, block after block: see pages.py."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import BLOCK, DOCS, run_page

ROOT = Path(__file__).parents[2]

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
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if BLOCK.search(path.read_text())
    and path.parent.name != "coming_from"  # test_coming_from.py
    and path.relative_to(DOCS).with_suffix("").as_posix() not in ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs_after_the_one_before(page, tmp_path, monkeypatch, capsys):
    run_page(page, tmp_path, monkeypatch, capsys)


def test_the_other_pages_are_run_elsewhere():
    for page, test in ELSEWHERE.items():
        assert (DOCS / f"{page}.md").exists()
        assert page in (ROOT / test).read_text()


def test_no_block_is_missed():
    """A fence that is indented, or in capitals, would not be run."""
    for page in DOCS.rglob("*.md"):
        if page.relative_to(DOCS).with_suffix("").as_posix() not in ELSEWHERE:
            text = page.read_text()
            fences = re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", text, flags=re.MULTILINE | re.IGNORECASE)
            assert len(fences) == len(BLOCK.findall(text)), page
