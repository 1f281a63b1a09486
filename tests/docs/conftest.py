"""Where the built site is, and whether the other packages of docs/coming_from have to be there."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--site", type=Path, help="check the site that `python -m mkdocs build` wrote to this folder")
    parser.addoption("--peers", action="store_true", help="fail where a package that docs/coming_from needs is missing")


def pytest_ignore_collect(collection_path, config):
    """The examples of the pages train for minutes, so they run where the site is built: `make test-docs`."""
    if collection_path.name == "test_pages.py" and config.getoption("--site", None) is None:
        return True
    return None


@pytest.fixture
def site(request):
    folder = request.config.getoption("--site", None)
    if folder is None:
        pytest.skip("needs a built site: `make test-docs`")
    return folder
