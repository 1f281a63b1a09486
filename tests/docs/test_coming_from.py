"""The pages that show another package's call beside ours. Each ends in a comparison of both results.

`make test` runs the part that is ours, and skips the rest where the package is missing; `make test-coming-from` has the packages.
"""

import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.docs.pages import BLOCK, DOCS, run_page

# Not in the package index, where another package has its name.
UNRELEASED = {"enn"}
REQUIREMENTS = Path(__file__).parents[2] / "benchmarks/requirements.txt"
PAGES = sorted(path.name for path in (DOCS / "coming_from").glob("*.md") if path.name != "index.md")


@pytest.mark.filterwarnings("default")  # other packages warn of much
@pytest.mark.parametrize("page", PAGES)
def test_both_calls_give_the_same(page, tmp_path, monkeypatch, capsys, request):
    # TorchCP imports torchsort, which has to be compiled, for a loss that no page uses.
    monkeypatch.setitem(sys.modules, "torchsort", Mock())
    missing = run_page(f"coming_from/{page}", tmp_path, monkeypatch, capsys)
    if request.config.getoption("--peers", False):
        assert missing <= UNRELEASED
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}; only our part of the page was run")


@pytest.mark.parametrize("page", PAGES)
def test_the_last_block_compares_both(page):
    """Else the page would pass whatever the numbers are."""
    condition, code = BLOCK.findall((DOCS / "coming_from" / page).read_text())[-1]
    assert not condition.startswith("not run")
    assert "assert" in code


def test_the_index_has_every_page():
    index = (DOCS / "coming_from/index.md").read_text()
    assert [page for page in PAGES if f"({page})" not in index] == []


def test_the_pages_name_the_versions_that_are_installed():
    """The rows of benchmarks/requirements.txt; the version stands in the head of a page's table."""
    installed = dict(re.findall(r"^([\w-]+)==([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE))
    text = "".join((DOCS / "coming_from" / page).read_text() for page in PAGES)
    named = {name.lower(): version for name, version in re.findall(r"\| ([\w-]+) ([\d.]+\d) (?=\|)", text)}
    assert len(named) == 10
    assert {name: installed[name] for name in named} == named
