"""lightly's LinearClassifier: a frozen backbone below a head, as its benchmarks evaluate it."""

from typing import Any

import torch
from lightly.utils.benchmarking import LinearClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


def build() -> Any:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LinearClassifier(backbone, batch_size_per_device=6, lr=0.1, feature_dim=8, num_classes=3, topk=(1, 2))


def loader(split: str) -> Any:
    y = torch.arange(12) % 3
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(SEEDS[split]))
    x[torch.arange(12), y] += 1
    return DataLoader(TensorDataset(x * (10 if split == "far" else 1), y), batch_size=6)


CLIENTS = [
    Client(
        "lightly LinearClassifier",
        "one class per image",
        ["lightly"],
        build,
        loader,
        lines={"load_fitted": "build()"},
        trainer="pytorch_lightning",
    )
]
