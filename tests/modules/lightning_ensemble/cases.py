"""A LightningModule of a user's, its data, and how it ends when it trains alone."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.running.streams import RandomStream

M, SEED = 3, 7


class Lit(LightningModule):
    """A user's module: dropout, BatchNorm, a metric, the usual steps."""

    def __init__(self, scheduler=None, dropout=0.0, optimizer=torch.optim.Adam, lr=0.05):
        super().__init__()
        self.scheduler, self.optimizer, self.lr = scheduler, optimizer, lr
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        if self.scheduler == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if self.scheduler == "every step":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "cosine"},
            }
        if self.scheduler == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}
        return optimizer


def dataset(n=50):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 3, generator=generator)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x @ weights + torch.randn(n, 3, generator=generator)).argmax(1))


def loader(n=50, **kwargs):
    # With a generator of its own the loader draws nothing from the global one.
    return DataLoader(dataset(n), batch_size=8, generator=torch.Generator().manual_seed(3), **kwargs)


def alone(i, factory, make_trainer, seed=SEED, fit=(), **kwargs):
    """Member i by itself, in a process (so to speak) seeded with its seed."""
    with RandomStream(member_seed(seed, i)).active():
        module = factory()
        trainer = make_trainer(**kwargs)
        trainer.fit(module, loader(), loader(20), *fit)
    return module, trainer


def difference(ensemble, i, module):
    ours, theirs = ensemble.network.member_state_dict(i), module.state_dict()
    assert ours.keys() == theirs.keys()
    return max(
        (ours[name].double() - theirs[name].double()).abs().max().item() for name in ours if theirs[name].numel()
    )


def described(options):
    """An id that is the same in every process: a function's or class's name, not its address."""
    return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "plain"


def scaled(growth_interval=3):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10, growth_interval=growth_interval))
