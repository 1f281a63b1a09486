"""README.md's examples run as written and have the numbers of their comments; its tables list every method; its figure can be drawn."""

import importlib.util
import logging
import re

import pytest

from lightning_uq.compare.planning.discovery import methods
from tests.readme import ROOT, TEXT, check_numbers, run_examples


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        patch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
        return run_examples()


def test_the_examples_have_the_numbers_of_their_comments(names):
    check_numbers(names)


def test_the_figure_is_drawn_from_the_examples(names):
    spec = importlib.util.spec_from_file_location("readme_figure", ROOT / "docs" / "figures" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figure = module.make_figure(names)
    assert len(figure.axes) == 5  # three panels and two colour bars
    assert [len(axes.collections) for axes in figure.axes[:3]] == [5, 5, 2]


def test_the_tables_have_a_row_for_every_method_that_the_demo_runs():
    rows = re.findall(r"^\| ([a-z_]+) \|.*±", TEXT, flags=re.MULTILINE)
    of_numbers = {name for name, method in methods("regression").items() if not method.detects_only}
    assert set(rows) == set(methods()) | of_numbers
    assert len(rows) == len(methods()) + len(of_numbers)


def test_it_is_short_and_its_links_lead_to_files():
    assert len(TEXT.splitlines()) < 150
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
