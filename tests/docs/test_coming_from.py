"""The pages that show another package's call beside ours. Each ends in a comparison of both results.

`make test` runs the part that is ours, and skips the rest where the package is missing; `make test-coming-from` has the packages.
"""

import sys
from unittest.mock import Mock

import pytest

from tests.docs.pages import BLOCK, DOCS, run_page

# Packages without a release in the package index.
UNRELEASED = {"enn", "ddu"}
PAGES = sorted(path.name for path in (DOCS / "coming_from").glob("*.md") if path.name != "index.md")


@pytest.mark.filterwarnings("default")  # other packages warn of much
@pytest.mark.parametrize("page", PAGES)
def test_both_calls_give_the_same(page, tmp_path, monkeypatch, capsys, request):
    # TorchCP imports torchsort, which has to be compiled, for a loss that no page uses.
    monkeypatch.setitem(sys.modules, "torchsort", Mock())
    missing = run_page(f"coming_from/{page}", tmp_path, monkeypatch, capsys)
    if request.config.getoption("--peers"):
        assert missing <= UNRELEASED
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} is not installed: only our part of the page was run")


@pytest.mark.parametrize("page", PAGES)
def test_the_last_block_compares_both(page):
    """Else the page would pass whatever the numbers are."""
    condition, code = BLOCK.findall((DOCS / "coming_from" / page).read_text())[-1]
    assert condition.startswith("needs")
    assert "assert" in code


def test_the_index_and_the_navigation_have_every_page():
    index = (DOCS / "coming_from/index.md").read_text()
    assert [page for page in PAGES if f"({page})" not in index] == []
