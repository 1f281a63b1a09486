"""The metrics inside a LightningModule: logged as objects, reset by Lightning, at any precision of the Trainer."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import metrics


class Evaluated(LightningModule):
    """A fixed linear classifier that logs metrics and keeps what they should be."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.ece = metrics.ExpectedCalibrationError(from_logits=True)
        self.nll = metrics.NegativeLogLikelihood(from_logits=True)
        self.aurc = metrics.AURC(from_logits=True)
        self.joint = metrics.JointLogLoss()
        self.auroc = metrics.OODAUROC()
        self.seen = []

    def on_validation_epoch_start(self):
        self.seen.clear()

    def validation_step(self, batch):
        x, y = batch
        logits = self.layer(x)
        self.seen.append((logits, y))
        self.ece(logits, y)
        self.nll(logits, y)
        self.aurc(logits, y)
        self.joint.update(logits[None], y)
        self.auroc.update(-logits.amax(1), y == 2)
        for name in ("ece", "nll", "aurc", "joint", "auroc"):
            self.log(name, getattr(self, name))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_logged_values(make_trainer, precision):
    rows = 600  # past 256, where a bfloat16 count would stop
    x = torch.randn(rows, 4)
    y = torch.randint(3, (rows,))
    model = Evaluated()
    trainer = make_trainer(precision=precision)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    for _ in range(2):  # Lightning resets in between
        logged = trainer.validate(model, loader, verbose=False)[0]
    logits, target = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
    assert len(logits) == rows
    with torch.inference_mode():
        alone = {
            "ece": metrics.ExpectedCalibrationError(from_logits=True),
            "nll": metrics.NegativeLogLikelihood(from_logits=True),
            "aurc": metrics.AURC(from_logits=True),
        }
        for name, metric in alone.items():
            metric.update(logits, target)
            assert logged[name] == pytest.approx(metric.compute().item(), abs=1e-6)
        joint = metrics.JointLogLoss()
        joint.update(logits[None], target)
        assert logged["joint"] == pytest.approx(joint.compute().item(), abs=1e-5)
        auroc = metrics.OODAUROC()
        auroc.update(-logits.amax(1), target == 2)
        assert logged["auroc"] == pytest.approx(auroc.compute().item(), abs=1e-6)
