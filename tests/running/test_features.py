"""Features of a stacked ensemble without a copy of its members at every batch; memory of a pooled calibration."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_uq.callbacks import FitGMM, FitViM, IsotonicScaling, MatrixScaling, TemperatureScaling, VectorScaling
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from lightning_uq.running.row_sample import RowSample

NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [6]})
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 2
LOADER = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 60, 10)]


@pytest.fixture
def copies(monkeypatch):
    """How many members were copied."""
    module = EnsembleModule(NETWORK, num_members=3, seed=0)
    assert module.network.is_stacked
    made, original = [], type(module.network).member
    monkeypatch.setattr(type(module.network), "member", lambda self, i: made.append(i) or original(self, i))
    return made


@pytest.mark.parametrize("make", [FitGMM, lambda: FitViM(dim=2)])
def test_a_pass_copies_each_member_at_most_once(copies, make):
    module = EnsembleModule(NETWORK, num_members=3, seed=0).eval()
    callback = make().fit(module, LOADER)
    assert len(copies) <= 3
    copies.clear()
    callback.score(module, LOADER)
    assert len(copies) == 3
    assert callback.features.at_layer._copies is None  # the memory is free again
    copies.clear()
    for x, _ in LOADER:
        module.predict(x)
    assert len(copies) <= 3


def test_copies_follow_the_weights(copies):
    module = EnsembleModule(NETWORK, num_members=3, seed=0).eval()
    gmm = FitGMM().fit(module, LOADER)
    features = gmm.features.at_layer
    with features.recording(module) as read:
        module(X)
    before = read()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    with features.recording(module) as read:
        module(X)
    assert not torch.allclose(read(), before)
    assert copy.deepcopy(features)._copies is None


@pytest.mark.parametrize(
    "make", [partial(TemperatureScaling, method="grid"), VectorScaling, MatrixScaling, IsotonicScaling]
)
@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class", "ignore:.*no finite positive temperature")
def test_a_pooled_calibration_keeps_pooled_rows(monkeypatch, make):
    kept, add = [], RowSample.add
    monkeypatch.setattr(
        RowSample, "add", lambda self, keys, rows, labels: kept.append(rows.numel()) or add(self, keys, rows, labels)
    )
    base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    module = DropoutModule(base, num_eval_samples=20).eval()
    make().fit(module, LOADER)
    assert sum(kept) == 60 * 2
    kept.clear()
    TemperatureScaling(scope="shared").fit(module, LOADER)
    assert sum(kept) == 20 * 60 * 2
