"""The evidential script: a run on generated images, and its table of known numbers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def result(accuracy: float, own: str, **of_score: float) -> dict[str, Any]:
    """A run whose AUROC is as given by name of the score; AUPR is half of it for the test set and a quarter for the others."""
    found: dict[str, Any] = {"accuracy": accuracy, "nll": 0.03, "ece": 0.01}
    for name in ("notmnist", "fashion"):
        for score in (own, "max_softmax", "predictive_entropy"):
            auroc = of_score.get(score, 0.8)
            found[f"{name}/{score}"] = {"auroc": auroc, "auprc_in": auroc / 2, "auprc_out": auroc / 4}
    return found


@pytest.mark.parametrize("module", ["evidential"], indirect=True)
def test_the_table_of_known_numbers(module: ModuleType):
    results = {
        "EDL-0": result(0.99, "vacuity", vacuity=0.9),
        "softmax-0": result(0.98, "max_softmax"),
        "EDL-1": result(0.98, "vacuity", vacuity=0.92),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in module.table(results).splitlines()]
    edl = [line for line in lines if line and line[0] == "EDL"]
    assert edl[0] == [
        "EDL", "2", "98.50 ±0.71", "99.3", "0.0300 ±0.0000", "1.00 ±0.00", "vacuity",
        *["91.00 ±1.41", "22.75 ±0.35"] * 2,
    ]  # fmt: skip
    assert edl[1] == ["EDL", *["91.00 ±1.41", "80.00 ±0.00", "80.00 ±0.00"] * 2]
    assert edl[2] == ["EDL", "40.00 ±0.00", "98.10", "45.50 ±0.71", "98.08"]
    assert [line[0] for line in lines if line and line[0] in module.METHODS] == ["softmax", "EDL"] * 3


@pytest.mark.parametrize("module", ["evidential"], indirect=True)
def test_every_method_runs(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 10
    x = torch.randint(0, 50, (300, 1, 28, 28), generator=generator, dtype=torch.uint8)
    x[torch.arange(300), 0, 2 * y, :] = 255  # a bright row tells the class
    sets = {"mnist": (x, y), "notmnist": (x, y), "fashion": (255 - x, y)}
    monkeypatch.setattr(module, "images", lambda name, root, train=False: sets[name])
    found = {method: module.run(method, 0, Path(), epochs=2) for method in module.METHODS}
    for method, values in found.items():
        assert values["nll"] > 0
        for score in module.scores(method):
            # Images that are the test set's cannot be distinguished from them.
            assert values[f"notmnist/{score}"]["auroc"] == pytest.approx(0.5, abs=1e-6), (method, score)
            assert 0 <= values[f"fashion/{score}"]["auroc"] <= 1
    assert module.own_score("Re-EDL") == "vacuity"
    # Re-EDL has no KL term, and both relaxed losses have a prior weight of 0.1: their tasks say so.
    tasks = {name: module.make_module(name, 2).task for name in module.LOSSES}
    assert {name: task.final_reg_factor for name, task in tasks.items()} == {
        "EDL": 1, "I-EDL": 1, "R-EDL": 1, "Re-EDL": 0
    }  # fmt: skip
    vacuous = {
        name: float(task.predict(torch.full((1, 1, 10), -50.0)).concentration.sum()) for name, task in tasks.items()
    }
    assert vacuous == pytest.approx({"EDL": 10, "I-EDL": 10, "R-EDL": 1, "Re-EDL": 1})
