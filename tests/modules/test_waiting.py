"""Nothing of ours waits for a GPU in a step of the training, and next to nothing in one of a test."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    BayesByBackpropModule,
    Binary,
    CalibratedNLL,
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    EvidentialModule,
    FitGMM,
    Multilabel,
    NotFiniteError,
    OODDetection,
    Regression,
    Segmentation,
    TemperatureScaling,
    VarianceScaling,
)
from tests.trainers import quiet_trainer
from tests.waiting import Operations, as_on_a_gpu

BATCHES, SIZE = 4, 16


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, outputs))


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 12)

    def forward(self, x):
        return self.linear(x).unflatten(1, (3, 2, 2))


MODULES = {
    "softmax": lambda: DeterministicModule(mlp()),
    "ensemble": lambda: EnsembleModule(mlp, num_members=3),
    "dropout": lambda: DropoutModule(mlp()),
    "epinet": lambda: EpinetModule(mlp(), feature_layers="0"),
    "bayes": lambda: BayesByBackpropModule(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), num_train=64),
    "evidential": lambda: EvidentialModule(mlp()),
    "gaussian": lambda: DeterministicModule(mlp(2), task=Regression("mean_variance")),
    "mean": lambda: EnsembleModule(lambda: mlp(1), num_members=3, task=Regression("mean")),
    "quantiles": lambda: DeterministicModule(mlp(3), task=Regression("quantiles", levels=(0.1, 0.5, 0.9))),
    "binary": lambda: DeterministicModule(mlp(1), task=Binary()),
    "multilabel": lambda: DeterministicModule(mlp(3), task=Multilabel()),
    "segmentation": lambda: DeterministicModule(Maps(), task=Segmentation()),
}


READ = {"binary": 1}
"""Float targets may be soft labels; which metrics take them depends on their values."""


def loader(name, x=None):
    torch.manual_seed(0)
    rows = BATCHES * SIZE
    x = torch.randn(rows, 4) if x is None else x
    targets = {
        "gaussian": torch.randn(rows, 1),
        "mean": torch.randn(rows, 1),
        "quantiles": torch.randn(rows, 1),
        "binary": torch.randint(2, (rows,)).float(),
        "multilabel": torch.randint(2, (rows, 3)).float(),
        "segmentation": torch.randint(3, (rows, 2, 2)),
    }
    return DataLoader(TensorDataset(x, targets.get(name, torch.randint(3, (rows,)))), batch_size=SIZE)


class CountOneBatch(Callback):
    """Counts the third batch: what the first one shows is looked at."""

    def __init__(self):
        self.operations = Operations()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._start(batch_idx)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._stop(batch_idx)

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self._start(batch_idx)

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._stop(batch_idx)

    def _start(self, batch_idx):
        if batch_idx == 2:
            self.operations.__enter__()

    def _stop(self, batch_idx):
        if batch_idx == 2:
            self.operations.__exit__(None, None, None)


@pytest.mark.parametrize("name", MODULES)
def test_no_step_waits(name, monkeypatch, tmp_path):
    as_on_a_gpu(monkeypatch)
    module = MODULES[name]()
    for run in ("fit", "test"):
        counted = CountOneBatch()
        getattr(quiet_trainer(tmp_path, callbacks=[counted]), run)(module, loader(name))
        assert counted.operations.names  # it has counted
        allowed = READ.get(name, 0) if run == "test" else 0
        assert counted.operations.waits.total() <= allowed, (run, counted.operations.waits)


CALLBACKS = {
    "softmax": lambda: [FitGMM(), TemperatureScaling(), OODDetection(ood={"far": loader("softmax")})],
    "ensemble": lambda: [TemperatureScaling(), CalibratedNLL(), ConformalSets()],
    "gaussian": lambda: [VarianceScaling(), ConformalIntervals()],
}


@pytest.mark.filterwarnings("ignore:The likelihood has no finite positive temperature")
@pytest.mark.parametrize("name", CALLBACKS)
def test_no_test_step_waits_for_fitted_callbacks(name, monkeypatch, tmp_path):
    as_on_a_gpu(monkeypatch)
    module, counted = MODULES[name](), CountOneBatch()
    trainer = quiet_trainer(tmp_path, callbacks=[*CALLBACKS[name](), counted])
    trainer.fit(module, loader(name), loader(name))
    counted.operations = Operations()
    trainer.test(module, loader(name), verbose=False)
    assert counted.operations.names
    assert not counted.operations.waits


def test_outputs_that_are_not_finite_are_refused_at_the_end(monkeypatch, tmp_path):
    as_on_a_gpu(monkeypatch)
    module = DeterministicModule(nn.Linear(4, 3))
    x = torch.randn(BATCHES * SIZE, 4)
    x[SIZE + 3] = 1e30  # finite, but not what the network makes of it
    with torch.no_grad():
        module.network.network.weight.fill_(1e30)
    seen = []

    class Count(Callback):
        def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(batch_idx)

    with pytest.raises(NotFiniteError, match="its outputs for 1 of 64 rows hold NaN or infinity"):
        quiet_trainer(tmp_path, callbacks=[Count()]).test(module, loader("softmax", x), verbose=False)
    assert seen == list(range(BATCHES))
