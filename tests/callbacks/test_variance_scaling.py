"""VarianceScaling: the factor against its definition, and what the contract asks of a callback on numbers."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.variance_scaling import VarianceScaling
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    NumberPrediction,
)

GENERATOR = torch.Generator().manual_seed(1)
ADAM = Factory("torch.optim.Adam", {"lr": 0.01})


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def loader(num: int = 41, outputs: int = 2, batch_size: int = 8) -> DataLoader:
    x = noise(num, 4)
    y = x[:, :outputs] * torch.tensor([1.0, 20.0])[:outputs] + 0.5 * noise(num, outputs)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


TRAIN, VAL, TEST = loader(40), loader(45), loader(31)


class UsersRegressor(LightningModule):
    """Two means, by somebody who has never heard of variances."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def network(out: int) -> Factory:
    return Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": out, "hidden_sizes": [8]})


def gaussian() -> DeterministicModule:
    return DeterministicModule(network(4), task="regression", optimizer=ADAM)


@torch.no_grad()
def predicted(module: LightningModule, x: torch.Tensor) -> NumberPrediction:
    return module.predict(x)


def test_trainer_scales_the_variance_of_a_gaussian(make_trainer, tmp_path):
    scaling, module = VarianceScaling(), gaussian()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(max_epochs=2, callbacks=[scaling, best], enable_checkpointing=True)
    trainer.fit(module, TRAIN, VAL)
    (tested,) = trainer.test(module, TEST, ckpt_path="best", verbose=False)
    prediction = NumberPrediction.cat(trainer.predict(module, TEST, ckpt_path="best"))

    scaling.handle.remove()
    x, y = VAL.dataset.tensors
    raw = predicted(module, x)
    torch.testing.assert_close(
        scaling.variance_scale, ((y - raw.mean).double().square() / raw.variance.double()).mean(0), rtol=1e-5, atol=0
    )
    x, y = TEST.dataset.tensors
    raw = predicted(module, x)
    assert isinstance(prediction, GaussianMixturePrediction)
    assert torch.equal(prediction.mean, raw.mean)
    torch.testing.assert_close(prediction.variance, raw.variance * scaling.variance_scale.float())
    torch.testing.assert_close(prediction.variance_scale, scaling.variance_scale.float())
    for name, one in (("", raw), ("_calibrated", prediction)):
        assert tested[f"uq/test_nll{name}"] == pytest.approx(-float(one.log_prob(y).mean()), rel=1e-5)
        assert tested[f"uq/test_crps{name}"] == pytest.approx(float(one.crps(y).mean()), rel=1e-5)
        assert tested[f"uq/test_coverage_95{name}"] == pytest.approx(float(one.covered(y, 0.95).float().mean()))
    assert tested["uq/test_nll"] > tested["uq/test_nll_calibrated"]
    assert scaling.uq_ckpt_path.endswith("-uq.ckpt")


def test_without_a_trainer(tmp_path):
    module = gaussian()
    scaling = VarianceScaling().fit(module, VAL)
    x, y = TEST.dataset.tensors
    changed = predicted(module, x)
    scaling.handle.remove()
    again = VarianceScaling().fit_predictions(predicted(module, VAL.dataset.tensors[0]), VAL.dataset.tensors[1])
    torch.testing.assert_close(again.variance_scale, scaling.variance_scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(again.change(predicted(module, x)).variance, changed.variance)
