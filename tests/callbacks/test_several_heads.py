"""Callbacks on the two heads of one user's module, each with an `output` of its own."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    Binary,
    ConformalIntervals,
    ConformalSets,
    FitGMM,
    FitLaplace,
    OODAlarm,
    Regression,
    SelectiveThreshold,
    TemperatureScaling,
    VarianceScaling,
)
from lightning_uq.errors import InputError
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.same_reading import difference_of_readings

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(240, 4, generator=GENERATOR)
SEX = (X[:, 0] + torch.randn(240, generator=GENERATOR) > 0).long()
RACE = (X[:, 1] + torch.randn(240, generator=GENERATOR)).mul(2).long().clamp(0, 2)
AGE = X[:, 2] + 0.3 * torch.randn(240, generator=GENERATOR)


class Faces(LightningModule):
    """Classes, other classes and a number from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.sex, self.race, self.age = nn.Linear(16, 2), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        h = self.trunk(x)
        return {"sex": self.sex(h), "race": self.race(h), "age": self.age(h).squeeze(1)}

    def _loss(self, batch):
        out = self(batch["x"])
        return (
            cross_entropy(out["sex"], batch["sex"])
            + cross_entropy(out["race"], batch["race"])
            + mse_loss(out["age"], batch["age"])
        )

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


class Rows(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("x", "sex", "race", "age"), super().__getitem__(index), strict=True))


def rows(start, stop):
    return DataLoader(Rows(*(part[start:stop] for part in (X, SEX, RACE, AGE))), batch_size=40)


def head(name, **kwargs):
    return {"output": lambda out: out[name], "unpack_batch": lambda batch: (batch["x"], batch[name]), **kwargs}


def train(make_trainer, *callbacks):
    torch.manual_seed(0)
    trainer, module = make_trainer(max_epochs=3, callbacks=list(callbacks)), Faces()
    trainer.fit(module, rows(0, 80), rows(80, 160))
    return trainer, module


def makes():
    return {
        "alarm": lambda: OODAlarm(score="predictive_entropy", **head("sex")),
        "sets": lambda: ConformalSets(alpha=0.1, **head("sex")),
        "threshold": lambda: SelectiveThreshold(risk=0.4, **head("sex")),
        "intervals": lambda: ConformalIntervals(alpha=0.1, **head("age", task=Regression(head="mean"))),
    }


CALIBRATIONS = {
    "temperature": lambda: TemperatureScaling(**head("race")),
    "laplace": lambda: FitLaplace(feature_layer="race", **head("race")),
    "scale": lambda: VarianceScaling(**head("age", task=Regression(head="mean"))),
}


# Intervals of the age read the head that the scale belongs to.
APART = [(make, one) for make in makes() for one in CALIBRATIONS if (make, one) != ("intervals", "scale")]


@pytest.mark.parametrize(("make", "calibration"), APART)
def test_a_calibration_of_another_head_changes_nothing(make_trainer, make, calibration):
    alone, beside = makes()[make](), makes()[make]()
    trainer, module = train(make_trainer, alone)
    expected = trainer.test(module, rows(160, 240), verbose=False)[0]
    trainer, module = train(make_trainer, CALIBRATIONS[calibration](), beside)
    found = trainer.test(module, rows(160, 240), verbose=False)[0]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    for name, tensor in alone.state.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(beside.state[name], tensor)
    x = {"x": X[160:240], "sex": SEX[160:240], "race": RACE[160:240], "age": AGE[160:240]}
    expected, predicted = (one.predict(module, x).__getstate__() for one in (alone, beside))
    assert any(value is not None for value in expected.values())
    torch.testing.assert_close(predicted, expected)


def test_it_is_told_which_argument_differs(make_trainer, caplog):
    with caplog.at_level("INFO"):
        train(make_trainer, TemperatureScaling(**head("race")), ConformalSets(alpha=0.1, **head("sex")))
    assert (
        "ConformalSets does not use the result of TemperatureScaling, because their `unpack_batch` differs"
        in caplog.text
    )


def test_a_calibration_after_the_sets_of_another_head_is_no_mistake(make_trainer):
    temperature = TemperatureScaling(**head("race"))
    train(make_trainer, ConformalSets(alpha=0.1, **head("sex")), temperature)
    assert temperature.fitted
    with pytest.raises(InputError, match="ConformalSets stands before TemperatureScaling"):
        train(make_trainer, ConformalSets(alpha=0.1, **head("sex")), TemperatureScaling(**head("sex")))


def test_functions_written_twice_read_the_same_head(make_trainer):
    """Each call of `head` makes new functions."""
    temperature, sets = TemperatureScaling(**head("sex")), ConformalSets(alpha=0.1, **head("sex"))
    trainer, module = train(make_trainer, temperature, sets)
    logits = module(X[80:160])["sex"] / temperature.temperature
    alone = ConformalSets(alpha=0.1).fit(nn.Identity(), [(logits.detach(), SEX[80:160])])
    assert "carried.temperature" in sets.state
    for name, tensor in alone.state.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(sets.state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:OODAlarm and the density before it were fitted to the same")
def test_a_density_belongs_to_every_head(make_trainer):
    gmm, alarm = FitGMM(feature_layer="trunk", **head("race")), OODAlarm(**head("sex"))
    train(make_trainer, gmm, alarm)
    assert alarm.state["score_name"] == "ood_score"


def reader(**kwargs):
    return LogitReader(**kwargs)


class Picker:
    def __init__(self, name):
        self.name = name

    def __call__(self, out):
        return out[self.name]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, None),
        (head("a"), head("a"), None),
        (head("a"), head("b"), "unpack_batch"),
        ({"output": lambda out: out[0]}, {"output": lambda out: out[0]}, None),
        ({"output": lambda out: out[0]}, {"output": lambda out: out[1]}, "output"),
        ({"output": lambda out: [o for o in out][0]}, {"output": lambda out: [o for o in out][0]}, None),  # noqa: C416, RUF015
        ({"output": lambda out, i=0: out[i]}, {"output": lambda out, i=1: out[i]}, "output"),
        ({"output": lambda out: out[True]}, {"output": lambda out: out[1]}, "output"),
        ({"output": torch.logit}, {"output": torch.logit}, None),
        ({"output": Picker("a")}, {"output": Picker("a")}, "output"),
        ({"output": "log_probs"}, {"output": "logits"}, None),
        ({"output": "probs"}, {"output": "logits"}, "output"),
        ({"predict_fn": lambda model, x: model(x)}, {}, "predict_fn"),
        ({"task": "binary"}, {}, None),
        ({"task": "binary"}, {"task": Binary()}, None),
        ({"task": "binary"}, {"task": "multilabel"}, "task"),
    ],
)
def test_readers_are_compared_by_what_their_functions_do(first, second, expected):
    assert difference_of_readings(reader(**first), reader(**second)) == expected
    assert difference_of_readings(reader(**second), reader(**first)) == expected
