"""Members that train alone train in an ensemble too, whatever the ensemble's own metrics make of their data."""

import logging
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import CalibratedNLL, EnsembleModule, FitGMM, InputError, TemperatureScaling

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Member(LightningModule):
    """Reads whatever batch it is given by its own helper."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x)

    def read(self, batch):
        return batch[0], batch[1]

    def loss(self, batch):
        x, y = self.read(batch)
        return F.cross_entropy(self.net(x), y, ignore_index=-100)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=1)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DictOutput(Member):
    def forward(self, x):
        return {"out": self.net(x), "aux": x}


class SwappedInput(Member):
    """Its input is the third, so the ensemble calls `forward` with something that it cannot take."""

    def read(self, batch):
        return batch[2], batch[1]


class FourTensors(Member):
    def read(self, batch):
        return batch["a"], batch["d"]


class Missing(Member):
    """Numbers that are missing; its own loss leaves them out."""

    def loss(self, batch):
        x, y = self.read(batch)
        kept = x.isfinite().all(1)
        return F.cross_entropy(self.net(x[kept]), y[kept])


class WithoutForward(Member):
    forward = LightningModule.forward


class OwnError(Member):
    def forward(self, x):
        if not self.training:
            raise KeyError("a branch that nobody has tried")
        return self.net(x)


def rows(*columns):
    return DataLoader(list(zip(*columns, strict=True)), batch_size=8)


NAN = X.clone()
NAN[3, 1] = math.nan
CASES = {
    "a label out of range": (Member, rows(X, torch.where(Y == 1, -100, Y)), "not class labels"),
    "a mapping as output": (DictOutput, rows(X, Y), r"keys \['aux', 'out'\].*argument `output`"),
    "another input": (SwappedInput, rows(X[:, :2], Y, X), r"does not take an input of shape \[8, 2\]"),
    "a mapping of many": (
        FourTensors,
        DataLoader([dict(zip("abcd", row, strict=True)) for row in zip(X, X, X, Y, strict=True)], batch_size=8),
        "keys are .*'a', 'b', 'c', 'd'.*Pass `unpack_batch`",
    ),
    "missing numbers": (Missing, rows(NAN, Y), "finite"),
    "no forward": (WithoutForward, rows(X, Y), "Pass `predict_fn`"),
    "an error of its own": (OwnError, rows(X, Y), "KeyError: 'a branch"),
}


UNREADABLE = ("a mapping of many", "no forward", "an error of its own")
"""Cases in which the ensemble cannot predict, which is a warning rather than a line of information."""
IS_WARNED = pytest.mark.filterwarnings("ignore:The members train by their own steps")


@pytest.mark.parametrize("case", CASES)
def test_members_train_and_validate_and_one_line_says_what_is_left_out(make_trainer, caplog, case):
    member, loader, reason = CASES[case]
    ensemble, trainer = (
        EnsembleModule(member, num_members=2, seed=0),
        make_trainer(max_epochs=2, num_sanity_val_steps=2),
    )
    with (
        warnings.catch_warnings(record=True) as warned,
        caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"),
    ):
        warnings.simplefilter("always")
        trainer.fit(ensemble, loader, loader)
    assert trainer.callback_metrics["val_loss"].isfinite()
    assert not any(name.startswith("ensemble/") for name in trainer.callback_metrics)
    noted = [record.message for record in caplog.records if "has no metrics" in record.message]
    told = [str(one.message) for one in warned if "has no metrics" in str(one.message)]
    assert (len(noted), len(told)) == ((0, 1) if case in UNREADABLE else (1, 0))
    assert re.search(reason, (noted + told)[0])


@pytest.mark.parametrize("with_validation", [True, False])
@pytest.mark.parametrize("case", ["a mapping of many", "no forward"])
def test_batches_that_the_ensemble_cannot_read_are_a_warning_before_the_first_step(make_trainer, case, with_validation):
    member, loader, reason = CASES[case]
    steps = []

    class Counting(member):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    ensemble = EnsembleModule(Counting, num_members=2, seed=0)
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=2)
    with pytest.warns(
        UserWarning, match=f"predictions of such batches will fail: .*{reason}.*only the members"
    ) as told:
        trainer.fit(ensemble, loader, loader if with_validation else None)
    assert len([one for one in told if "such batches will fail" in str(one.message)]) == 1
    steps.clear()
    other = EnsembleModule(Counting, num_members=2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The members train by their own steps")
        with pytest.raises(UserWarning, match="predictions of such batches will fail"):
            make_trainer(max_epochs=1).fit(other, loader)
    assert not steps


@IS_WARNED
@pytest.mark.parametrize("case", [case for case in CASES if case != "missing numbers"])
def test_a_test_of_them_runs_too(make_trainer, case):
    member, loader, _ = CASES[case]
    (found,) = make_trainer().test(EnsembleModule(member, num_members=2, seed=0), loader, verbose=False)
    assert math.isfinite(found["test_loss" if "test_loss" in found else "val_loss"])


def test_outside_a_training_an_input_that_is_not_finite_is_an_error(make_trainer):
    member, loader, _ = CASES["missing numbers"]
    with pytest.raises(InputError, match="input must be finite, but 1 of 8 rows"):
        make_trainer().test(EnsembleModule(member, num_members=2, seed=0), loader, verbose=False)


def test_a_forward_with_any_arguments_is_measured(make_trainer):
    class AnyArguments(Member):
        def forward(self, *args, **kwargs):
            return self.net(*args, **kwargs)

    (found,) = make_trainer().test(EnsembleModule(AnyArguments, num_members=2, seed=0), rows(X, Y), verbose=False)
    assert "ensemble/test_nll" in found


def test_functions_that_are_passed_bring_the_metrics_back(make_trainer):
    glue = {
        "a mapping as output": {"output": lambda out: out["out"]},
        "another input": {"unpack_batch": lambda batch: (batch[2], batch[1])},
        "a mapping of many": {"unpack_batch": lambda batch: (batch["a"], batch["d"])},
        "no forward": {"predict_fn": lambda member, x: member.net(x)},
    }
    for case, functions in glue.items():
        member, loader, _ = CASES[case]
        ensemble, trainer = EnsembleModule(member, num_members=2, seed=0, **functions), make_trainer(max_epochs=1)
        trainer.fit(ensemble, loader, loader)
        assert "ensemble/val_nll" in trainer.callback_metrics, case
        assert trainer.predict(ensemble, loader)[0].probs.shape == (8, 3)


def test_prediction_without_a_forward_names_the_argument(make_trainer):
    with pytest.raises(InputError, match="WithoutForward has no `forward`.*Pass argument `predict_fn`"):
        make_trainer().predict(EnsembleModule(WithoutForward, num_members=2, seed=0), rows(X, Y))


@IS_WARNED
@pytest.mark.parametrize("callback", [FitGMM, TemperatureScaling, CalibratedNLL])
def test_a_callback_that_needs_what_cannot_be_read_refuses_before_the_training(make_trainer, callback):
    member, loader, _ = CASES["a mapping of many"]
    ensemble, trainer = (
        EnsembleModule(member, num_members=2, seed=0),
        make_trainer(max_epochs=2, callbacks=[callback()], num_sanity_val_steps=2),
    )
    with pytest.raises(InputError, match="Pass `unpack_batch`"):
        trainer.fit(ensemble, loader, loader)
    assert trainer.global_step == 0
