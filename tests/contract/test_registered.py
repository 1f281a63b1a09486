"""The list is complete: what the package exports is in it."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightning_uq import callbacks, metrics, modules
from lightning_uq.modules.base import UncertaintyModule
from tests.contract.cases import AXES, CALLBACKS, METRICS, MODULES, REPRESENTATIVES
from tests.contract.users import USERS

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"


def _exported(room, base):
    found = {getattr(room, name) for name in room.__all__}
    return {item for item in found if isinstance(item, type) and issubclass(item, base) and item is not base}


def test_every_module_is_in_the_list():
    assert {type(case.build()) for case in MODULES} >= _exported(modules, UncertaintyModule)


def test_every_callback_is_in_the_list():
    writer = {callbacks.PredictionWriter}  # test_predict.py puts it on every module
    assert {type(case.build()) for case in CALLBACKS} >= _exported(callbacks, Callback) - writer


def test_every_metric_is_in_the_list():
    assert {case.name for case in METRICS} == set(metrics.__all__)


def test_names_are_distinct():
    names = [case.name for case in [*MODULES, *CALLBACKS, *METRICS, *USERS]]
    assert len(set(names)) == len(names)
    assert set(names) >= REPRESENTATIVES


def test_the_published_grid_has_a_row_for_each_and_no_failure(request):
    if request.config.getoption("--grid", None):
        pytest.skip("the page is being written")
    text = PAGE.read_text()
    for case in [*MODULES, *CALLBACKS, *METRICS, *USERS]:
        assert f"| {case.name} |" in text, f"run `make contract`: {case.name} is not in {PAGE.name}"
    columns = {cell.strip() for line in text.splitlines() if line.startswith("| | ") for cell in line.split("|")}
    assert set(AXES) <= columns, f"run `make contract`: {set(AXES) - columns} are not in {PAGE.name}"
    assert "fails" not in text
