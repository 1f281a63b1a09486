"""A training that diverges costs its method the row, and no other method anything."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_uq import DeterministicModule, Method
from lightning_uq.cli import main
from lightning_uq.compare import Configuration, Recipe, compare
from lightning_uq.compare.planning import discovery
from lightning_uq.compare.planning import plan as plan_module
from lightning_uq.compare.planning.trial import try_methods
from lightning_uq.compare.problem import make_problem
from lightning_uq.errors import InputError, NotFiniteError
from tests.compare.test_run_directory import QUICK, rows, run


class Explodes(nn.Module):
    """With the seed 1 it returns infinity from the 5th training batch on."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.explodes = torch.initial_seed() == 1
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        factor = float("inf") if self.explodes and self.calls > 4 else 1.0
        return self.network(x) * factor


class FitFails(Callback):
    def on_train_end(self, trainer, pl_module):
        if torch.initial_seed() == 1:
            raise NotFiniteError("The features hold NaN.")


METHODS = {
    "explodes": Method(
        name="explodes",
        build=lambda setting: DeterministicModule(Explodes(setting.network()), **setting.training),
        ood_score="variance",
        tasks=("regression",),
    ),
    "fit_fails": Method(
        name="fit_fails",
        trained_as="gaussian",
        callbacks=lambda setting: [FitFails()],
        ood_score="variance",
        tasks=("regression",),
    ),
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    known = {**discovery.methods("regression"), **METHODS}
    monkeypatch.setattr(plan_module, "methods", lambda task="classification": dict(known))


def test_the_others_go_on_and_the_results_say_why(tmp_path):
    both = replace(QUICK, methods=("explodes", "gaussian"))
    found, log = run(tmp_path, both)
    assert log.trained_methods == [(name, seed) for name in ("explodes", "gaussian") for seed in (0, 1)]
    assert any("explodes has no row: it diverged at seed 1" in note for note in log.notes)
    results = found.results()
    assert [row["method"] for row in results["rows"]] == ["gaussian"]
    assert results["left_out"]["explodes"].startswith("it diverged at seed 1 (")
    assert results["missing"] == {}
    assert rows(found) == rows(compare(replace(QUICK, methods=("gaussian",))))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["left_out"] == results["left_out"]

    again, log = run(tmp_path, both, resume=True)
    assert log.trained_methods == []
    assert any("explodes diverged in" in note and "not trained again" in note for note in log.notes)
    assert again.results()["left_out"] == results["left_out"]
    run(tmp_path, replace(QUICK, methods=("evidential",)))  # neither is it missing where others join


def test_the_command_line_tells_and_succeeds(tmp_path, capsys):
    arguments = ["--methods", "explodes,gaussian", "--baseline", "explodes", "--seeds", "2", "--max-epochs", "1"]
    assert main(["compare", "--data", "diabetes", *arguments, "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "Left out explodes: it diverged at seed 1" in error
    assert "explodes, the requested baseline, has no row. gaussian replaces it." in error
    page = (tmp_path / "report.html").read_text()
    assert "diverged at seed 1" in page
    assert "gaussian replaces it" in page


def test_a_fit_after_the_training_costs_its_own_row_alone():
    found, log = run(None, replace(QUICK, methods=("gaussian", "fit_fails")))
    assert [row["method"] for row in found.rows] == ["gaussian"]
    assert found.left_out == {"fit_fails": "it diverged at seed 1 (The features hold NaN)"}
    assert len(log.trained_methods) == 2


def test_a_fit_that_fails_in_the_trial_is_found_there():
    configuration = replace(QUICK, seed=1, seeds=1)
    known = {**discovery.methods("regression"), **METHODS}
    groups = {"gaussian": [known["gaussian"], known["fit_fails"]]}
    left_out = try_methods(groups, known, set(), make_problem(configuration, 1), configuration)
    assert left_out == {"fit_fails": "The features hold NaN"}


def test_where_none_is_left_it_is_an_error(tmp_path):
    with pytest.raises(NotFiniteError, match=r"methods: No method has a row. explodes: it diverged at seed 1"):
        run(tmp_path, replace(QUICK, methods=("explodes",)))


MISSING = """
import torch
from lightning import LightningModule
from torch.nn.functional import mse_loss


class LitNan(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(10, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_mse", mse_loss(self(batch[0]), batch[1]) * (float("nan") if self.current_epoch == 1 else 1.0))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)
"""


def test_a_training_that_a_metric_stopped_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lit_nan.py").write_text(MISSING)
    (tmp_path / "run").mkdir()
    mine = Configuration(
        data="diabetes", module="lit_nan:LitNan", methods=("module",), seeds=1, recipe=Recipe(max_epochs=9)
    )
    found, _ = run(tmp_path / "run", mine)
    told = "Trainings stopped early, because a validation metric was not finite: module, seed 0, after 2 epochs, as val_mse was nan."
    assert found.results()["notes"] == [told]
    assert run(tmp_path / "run", mine)[0].results()["notes"] == [told]  # read from the record
    assert run(None, replace(QUICK, seeds=1))[0].results()["notes"] == []


def test_an_input_error_still_ends_all(monkeypatch):
    bad = replace(METHODS["fit_fails"], callbacks=lambda setting: [Refuses()])
    monkeypatch.setitem(METHODS, "fit_fails", bad)
    known = {**discovery.methods("regression"), **METHODS}
    monkeypatch.setattr(plan_module, "methods", lambda task="classification": dict(known))
    with pytest.raises(InputError, match="cannot be fitted"):
        run(None, replace(QUICK, methods=("gaussian", "fit_fails")))


class Refuses(Callback):
    def on_train_end(self, trainer, pl_module):
        if torch.initial_seed() == 1:
            raise InputError("It cannot be fitted.")
