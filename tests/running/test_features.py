"""Features of a stacked ensemble without a copy of its members; memory of a pooled calibration."""

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
from tests.counting import peak_bytes

NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [6]})
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 2
LOADER = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 60, 10)]


@pytest.mark.parametrize("execution", ["stacked", "vmap"])
@pytest.mark.filterwarnings("ignore:The largest logits")
@pytest.mark.parametrize("make", [FitGMM, lambda: FitViM(dim=2)])
def test_members_are_not_copied(monkeypatch, make, execution):
    wide = Factory(NETWORK.target, {**NETWORK.kwargs, "hidden_sizes": [2000, 2000, 6]})
    module = EnsembleModule(wide, num_members=3, seed=0, execution=execution).eval()
    assert module.network.is_stacked
    weights = 3 * 2000 * 2000 * 4
    callback = make()
    assert peak_bytes(lambda: callback.fit(module, LOADER)) < weights / 2
    assert peak_bytes(lambda: callback.score(module, LOADER)) < weights / 2
    assert callback.features.at_layer._members is None  # they are free again
    module.predict(X)
    made = []
    monkeypatch.setattr(
        type(module.network), "_skeleton", lambda self: made.append(1) or self._hidden[0].train(self.training)
    )
    for x, _ in LOADER:
        module.predict(x)
    assert len(made) <= len(LOADER)  # at most the call of the ensemble itself: no members are made anew


@pytest.mark.parametrize("how", ["in place", "other tensors"])
def test_features_follow_the_weights(how):
    module = EnsembleModule(NETWORK, num_members=3, seed=0).eval()
    gmm = FitGMM().fit(module, LOADER)
    features = gmm.features.at_layer

    def read():
        with features.recording(module) as recorded:
            module(X)
        return recorded()

    before = read()
    state = {name: 2 * value for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=how == "other tensors")
    after = read()
    assert not torch.allclose(after, before)
    alone = EnsembleModule(NETWORK, num_members=3, seed=0, execution="loop").eval()
    alone.load_state_dict(state)
    with features.recording(alone) as recorded:
        alone(X)
    torch.testing.assert_close(after, recorded())
    assert copy.deepcopy(features)._members is None


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
