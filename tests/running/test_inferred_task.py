"""Regressors of somebody else's without a task: tabular [B], a forecaster [B, H]; callbacks and ensembles read them as means."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    EnsembleModule,
    FitGMM,
    FitKNN,
    InputError,
    OODDetection,
    PointPrediction,
    QuantilePrediction,
    TemperatureScaling,
)
from lightning_uq.functional.ood import auroc
from lightning_uq.running.inferred_task import inferred_task
from lightning_uq.tasks import Regression


class Regressor(LightningModule):
    """A tabular MLP: outputs [B, 1] squeezed to [B], targets [B]."""

    loss = staticmethod(F.mse_loss)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Forecaster(Regressor):
    """An LSTM over [B, T, 4] that says the next H = 3 values [B, H]."""

    num_outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, self.num_outputs)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


class QuantileForecaster(Forecaster):
    """Three quantiles of each of the next three values: outputs [B, H, 3], targets [B, H]."""

    num_outputs = 9

    def forward(self, x):
        return super().forward(x).unflatten(-1, (3, 3))

    @staticmethod
    def loss(output, target):
        error = target.unsqueeze(-1) - output
        levels = torch.tensor([0.1, 0.5, 0.9])
        return torch.maximum(levels * error, (levels - 1) * error).mean()


def data(module=Regressor, num=40, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num, 4) if module is Regressor else (num, 5, 4)
    x = torch.randn(shape, generator=generator) + shift
    y = x.sum(1) if module is Regressor else x[:, -3:].sum(2)
    return DataLoader(TensorDataset(x, y + 0.1 * torch.randn(y.shape, generator=generator)), batch_size=8)


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(
        "lightning_uq.guessing.rank_zero_info", lambda text: lines.append(text) if "`task=" in text else None
    )
    return lines


each_module = pytest.mark.parametrize("module", [Regressor, Forecaster])


@each_module
def test_densities_and_distances_of_a_regressor(make_trainer, module, told):
    model, far = module(), data(module, 15, 3, shift=20.0)
    layer = {"feature_layer": "net.2" if module is Regressor else "head"}
    gmm, knn = FitGMM(feature_transform="raw", **layer), FitKNN(k=3, **layer)
    trainer = make_trainer(callbacks=[gmm, knn, OODDetection({"far": far})], max_epochs=2)
    trainer.fit(model, data(module), data(module, 20, 1))
    (tested,) = trainer.test(model, data(module, 21, 2), verbose=False)
    assert {name.rsplit("/", 1)[1] for name in tested if "ood" in name} == {"log_density", "knn"}
    inside, outside = gmm.score(model, data(module, 21, 2)), gmm.score(model, far)
    is_ood = torch.arange(36) >= 21
    expected = auroc(torch.cat([inside, outside]), is_ood).item()
    assert tested["ood_auroc/far/log_density"] == pytest.approx(expected)
    assert len(told) == 1
    assert "is read with `task=Regression(head='mean')`, because its outputs have the shape of its targets" in told[0]


def test_one_network_without_another_score_is_refused(make_trainer, told):
    trainer = make_trainer(callbacks=[OODDetection({"far": data(num=9)})])
    with pytest.raises(
        InputError, match=r"Regression\(head='mean'\) has no score for a single network. Score an ensemble"
    ):
        trainer.test(Regressor(), data(), verbose=False)


def test_a_calibration_of_classes_refuses_numbers(make_trainer, told):
    with pytest.raises(InputError, match=r"Regression\(head='mean'\)"):
        make_trainer(callbacks=[TemperatureScaling()]).fit(Regressor(), data(), data(num=20, seed=1))


def test_predictions_need_the_task_by_name(make_trainer, told):
    """Batches to predict hold no target, so with `attach=True` nothing is inferred."""
    with pytest.raises(InputError, match="or the `task` of these targets"):
        make_trainer(callbacks=[FitGMM(attach=True)]).fit(Regressor(), data(), data(num=20, seed=1))
    gmm = FitGMM(attach=True, task=Regression(head="mean"))
    trainer = make_trainer(callbacks=[gmm])
    model = Regressor()
    trainer.fit(model, data(), data(num=20, seed=1))
    first = trainer.predict(model, data(num=8, seed=2))[0]
    assert isinstance(first, PointPrediction)
    assert first.log_density.shape == (8,)
    assert not told


@each_module
@pytest.mark.parametrize("validates", [True, False])
def test_an_ensemble_of_regressors(make_trainer, module, validates, told, tmp_path):
    far = data(module, 15, 3, shift=20.0)
    ensemble = EnsembleModule(module, num_members=3, seed=0)
    trainer = make_trainer(
        callbacks=[OODDetection({"far": far}), ModelCheckpoint(tmp_path, save_last=True)],
        enable_checkpointing=True,
        max_epochs=2,
    )
    trainer.fit(ensemble, data(module), data(module, 20, 1) if validates else None)
    assert ("ensemble/val_rmse" in trainer.callback_metrics) is validates
    (first, *_) = trainer.predict(ensemble, data(module, 8, 2))
    assert isinstance(first, PointPrediction)
    x, y = data(module, 8, 2).dataset.tensors
    members = torch.stack([ensemble.network.member(i).eval()(x) for i in range(3)]).detach()
    torch.testing.assert_close(first.mean.reshape(y.shape), members.mean(0))
    (tested,) = trainer.test(ensemble, data(module, 8, 2), verbose=False)
    assert tested["ensemble/test_rmse"] == pytest.approx((members.mean(0) - y).square().mean().sqrt().item(), rel=1e-5)
    assert tested["ensemble/test_mae"] == pytest.approx((members.mean(0) - y).abs().mean().item(), rel=1e-5)
    assert "ood_auroc/far/epistemic_variance" in tested
    assert len(told) == 1
    again = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.task == Regression(head="mean")
    torch.testing.assert_close(again.predict(x).mean, first.mean)


def test_training_goes_on_as_without_the_question(make_trainer, told):
    """The forward pass that tells the task leaves no trace: neither in dropout's draws nor in the statistics of BatchNorm."""

    class Random(Regressor):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    weights = []
    for task in ({}, {"task": Regression(head="mean")}):
        ensemble = EnsembleModule(Random, num_members=2, seed=0, **task)
        make_trainer(max_epochs=2).fit(ensemble, data(), data(num=20, seed=1))
        weights.append(ensemble.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_ensemble_of_quantile_forecasters(make_trainer):
    ensemble = EnsembleModule(QuantileForecaster, num_members=2, seed=0, task=Regression(head="quantiles"))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, data(Forecaster), data(Forecaster, 20, 1))
    (tested,) = trainer.test(ensemble, data(Forecaster, 8, 2), verbose=False)
    x, y = data(Forecaster, 8, 2).dataset.tensors
    members = torch.stack([ensemble.network.member(i).eval()(x) for i in range(2)]).detach().sort(-1).values
    assert tested["ensemble/test_pinball"] == pytest.approx(
        QuantileForecaster.loss(members.mean(0), y).item(), rel=1e-5
    )
    assert tested["ensemble/test_loss"] == pytest.approx(
        torch.stack([ensemble.network.member(i).loss(ensemble.network.member(i)(x), y) for i in range(2)])
        .mean()
        .item(),
        rel=1e-5,
    )
    (first,) = trainer.predict(ensemble, data(Forecaster, 8, 2))
    assert isinstance(first, QuantilePrediction)
    low, high = first.interval(0.8)
    assert low.shape == (8, 3, 1)
    torch.testing.assert_close(high.squeeze(-1), members.mean(0)[..., 2])


@pytest.mark.parametrize(
    ("outputs", "target", "expected"),
    [
        ((5,), torch.linspace(0, 2, 5), True),
        ((5, 1), torch.linspace(0, 2, 5), True),
        ((5,), torch.linspace(0, 2, 5).unsqueeze(1), True),
        ((5, 3), torch.linspace(-1, 2, 15).reshape(5, 3), True),
        ((5, 3), torch.full((5, 3), 1 / 3), False),  # soft labels
        ((5, 3), (torch.arange(15).reshape(5, 3) % 2).float(), False),  # labels that are on or off
        ((5,), torch.arange(5), False),  # classes
        ((5, 3), torch.linspace(0, 2, 5), False),
        ((5, 2), torch.linspace(0, 2, 5).unsqueeze(1), False),  # a mean and a variance
        ((5,), torch.full((5,), torch.nan), False),
        ((5,), torch.tensor([0.5, torch.nan, 1.0, 0.0, 2.0]), True),
        ((0,), torch.zeros(0), False),
        ((5,), "text", False),
    ],
)
def test_what_looks_like_a_regression(outputs, target, expected):
    assert (inferred_task(torch.zeros(outputs), target) == "mean") is expected


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.2, 4.0]])


@pytest.mark.parametrize(
    ("outputs", "target", "expected"),
    [
        (LOGITS[:, 0], torch.tensor([1.0, 0.0]), "binary"),
        (LOGITS[:, :1], torch.tensor([True, False]), "binary"),
        (LOGITS[:, 0], torch.tensor([[1], [0]]), "binary"),
        (LOGITS[:, 0], torch.tensor([0.0, 0.0]), None),  # a number that is rarely above 0, perhaps
        (torch.sigmoid(LOGITS[:, 0]), torch.tensor([1.0, 0.0]), None),  # probabilities, perhaps
        (LOGITS, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "multilabel"),
        (LOGITS, torch.tensor([[1, 1, 0], [0, 0, 1]]), "multilabel"),
        (LOGITS, torch.tensor([[1.0, math.nan, 0.0], [0.0, 0.0, 1.0]]), "multilabel"),
        (LOGITS, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), None),  # one of three classes
        (torch.sigmoid(LOGITS), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), None),
        (LOGITS, torch.tensor([0, 2]), None),
        (LOGITS, torch.tensor([[1, 3, 0], [0, 0, 1]]), None),  # counts
    ],
)
def test_what_looks_like_labels_that_are_on_or_off(outputs, target, expected):
    assert inferred_task(outputs, target) == expected


RANKS = """
import json, os, torch
from contextlib import contextmanager
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset
from lightning_uq import OODDetection
from lightning_uq.errors import InputError
from tests.running.test_inferred_task import Forecaster, data

RANK = int(os.environ.get("LOCAL_RANK", 0))
x, y = data(Forecaster, 16).dataset.tensors
far = DataLoader(data(Forecaster, 9, 3, 20.0).dataset.tensors[0], 4)


class Rows(IterableDataset):
    def __init__(self, targets):
        self.targets = targets  # of each rank, None for no row

    def __iter__(self):
        return iter(()) if self.targets[RANK] is None else iter(zip(x, self.targets[RANK]))


class Size(Callback):
    ood_score_names = ("size",)

    @contextmanager
    def ood_scores(self, model):
        yield lambda outputs: {"size": outputs[0].abs().sum(1)}


def test(*targets):
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Size(), OODDetection({"far": far})],
    )
    torch.manual_seed(0)
    try:
        trainer.test(Forecaster(), DataLoader(Rows(targets), 8), verbose=False)
    except InputError as error:
        return str(error)
    return sorted(name for name in trainer.callback_metrics if "auroc" in name)


results = {}
for name, targets in {"no batch": (y, None), "no sign": (y, torch.zeros_like(y))}.items():
    gathered = [None, None]
    found = test(*targets)
    torch.distributed.all_gather_object(gathered, found)
    results[name] = gathered
if RANK == 0:
    json.dump(results, open(out, "w"))
"""


@pytest.mark.slow
def test_ranks_agree_on_the_task(run_script):
    """A rank without a batch takes it from the others; one whose batch says otherwise is an error on all."""
    found = run_script(RANKS, timeout=120)
    assert found["no batch"] == [["ood_auroc/far/size"]] * 2
    first, second = found["no sign"]
    assert first == second
    assert isinstance(first, str)
