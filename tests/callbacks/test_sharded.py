"""Callbacks on a model that FSDP2 shards over two processes: the same fit, weights and predictions as on the whole model in one."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import FitGMM, FitLaplace, OODDetection, PredictionWriter, TemperatureScaling, load_fitted
from lightning_uq.callbacks import read_predictions
from lightning_uq.networks.fingerprint import weights_fingerprint

N = 21  # in batches of 5: three for rank 0, two for rank 1


class Lit(LightningModule):
    """A user's module with sharded layers, a root that shards the rest, and a BatchNorm whose buffers differ between ranks."""

    policy = {}

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))

    def configure_model(self):
        if self.device_mesh is None or hasattr(self.net, "unshard"):
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=mesh, **self.policy)
        fully_shard(self.net, mesh=mesh, **self.policy)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        # Worse in every epoch, so that the best weights are not the last ones.
        cross_entropy(self(batch[0]), batch[1])
        self.log("worse", float(self.current_epoch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def data(seed=0, shift=0.0, size=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 4, generator=generator) + shift
    return DataLoader(TensorDataset(x, torch.arange(N) % 3), batch_size=size)


def fits(**kwargs):
    options = {"weights": "last", "attach": True, **kwargs}
    return [
        FitGMM(dataloader=data(), regularization=0.1, **options),
        FitLaplace(dataloader=data(), **options),
        TemperatureScaling(dataloader=data(1), **options),
    ]


def trainer(directory, devices, *callbacks, **strategy):
    return Trainer(
        accelerator="cpu", devices=devices, logger=False, max_epochs=2, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        default_root_dir=directory, num_sanity_val_steps=1,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1, **strategy) if devices > 1 else "auto",
        callbacks=list(callbacks),
    )  # fmt: skip
