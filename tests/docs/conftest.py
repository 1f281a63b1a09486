"""The option that says where the built site is."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--site", type=Path, help="check the site that `python -m mkdocs build` wrote to this folder")


@pytest.fixture
def site(request):
    folder = request.config.getoption("--site", None)
    if folder is None:
        pytest.skip("needs a built site: `make test-docs`")
    return folder
