"""The page's column `gpu` takes what a run on a GPU recorded, and says when and where it ran."""

import json

import pytest
import torch

from tests.contract import gpu_results
from tests.contract.cases import MODULES
from tests.contract.conftest import grid, pytest_configure

FIRST, SECOND, THIRD = (case.name for case in MODULES[:3])
HERE = {
    **{(name, "32-true"): {("passed", "")} for name in (FIRST, SECOND, THIRD)},
    **{(name, "gpu"): {("skipped", "there was no CUDA device")} for name in (FIRST, SECOND, THIRD)},
}
ON_GPU = {
    (FIRST, "gpu"): {("passed", "")},
    (SECOND, "gpu"): {("passed", ""), ("failed", "")},
    ("gone", "gpu"): {("passed", "")},
    (FIRST, "32-true"): {("failed", "")},
}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Example")
    gpu_results.record(tmp_path / "gpu.json", ON_GPU)
    return json.loads((tmp_path / "gpu.json").read_text())


def cells_of(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_recorded_column_is_shown_with_its_date_and_card(recorded):
    text = grid(HERE, recorded)
    assert cells_of(text, FIRST) == ["yes", "yes"]  # the other axes are those of this run
    assert cells_of(text, SECOND) == ["yes", "**fails**"]
    assert cells_of(text, THIRD) == ["yes", "no [^1]"]  # not in the record
    assert "| gone |" not in text
    assert f"is that of a run on {recorded['date']} on one NVIDIA Example, with torch {torch.__version__}." in text


def test_without_a_record_the_page_says_that_there_was_no_gpu():
    text = grid(HERE)
    assert cells_of(text, FIRST) == ["yes", "no [^1]"]
    assert "[^1]: there was no CUDA device" in text
    assert "is that of a run on" not in text


def test_what_ran_here_goes_before_the_record(recorded):
    text = grid({**HERE, (FIRST, "gpu"): {("failed", "")}}, recorded)
    assert cells_of(text, FIRST)[1] == "**fails**"


def test_a_record_needs_tests_on_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="no test of the axis `gpu`"):
        gpu_results.record(tmp_path / "gpu.json", {(FIRST, "32-true"): {("passed", "")}})
    assert not (tmp_path / "gpu.json").exists()


def test_a_record_is_refused_at_once_where_there_is_no_gpu(pytestconfig, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pytestconfig.option, "record_gpu", "gpu.json", raising=False)
    with pytest.raises(pytest.UsageError, match="needs a CUDA device"):
        pytest_configure(pytestconfig)
