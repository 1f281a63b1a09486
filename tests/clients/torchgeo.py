"""torchgeo's tasks: batches are mappings with ``image`` and ``label`` or ``mask``, and ``forward`` takes ``*args, **kwargs``."""

from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchgeo.trainers import ClassificationTask, PixelwiseRegressionTask, SemanticSegmentationTask

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


class Scenes(Dataset):
    """Noise with a colour for each class, or with a bright square."""

    def __init__(self, kind: str, split: str) -> None:
        generator = torch.Generator().manual_seed(SEEDS[split])
        num = 12
        labels = torch.arange(num) % 3
        self.image = torch.randn(num, 3, 32, 32, generator=generator)
        self.image[torch.arange(num), labels] += 1
        if split == "far":
            self.image *= 8
        maps = (self.image[:, 0] > 0).long() + (self.image[:, 1] > 1).long()
        self.name, self.target = {
            "multiclass": ("label", labels),
            "binary": ("label", labels.clamp(max=1)),
            "multilabel": ("label", torch.stack([labels == 0, labels > 0, torch.arange(num) % 2 == 0], 1).long()),
            "segmentation": ("mask", maps),
            "depth": ("mask", self.image.mean(1)),
        }[kind]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.image[index], self.name: self.target[index]}


def loader(kind: str, split: str) -> Any:
    return DataLoader(Scenes(kind, split), batch_size=6)


CLIENTS = [
    Client(
        "torchgeo ClassificationTask",
        "one class per image",
        ["torchgeo", "timm"],
        partial(ClassificationTask, model="resnet18", in_channels=3, num_classes=3),
        partial(loader, "multiclass"),
    ),
    Client(
        "torchgeo ClassificationTask, binary",
        "one logit per image",
        ["torchgeo", "timm"],
        partial(ClassificationTask, model="resnet18", in_channels=3, task="binary", loss="bce"),
        partial(loader, "binary"),
    ),
    Client(
        "torchgeo ClassificationTask, multilabel",
        "several labels per image",
        ["torchgeo", "timm"],
        partial(ClassificationTask, model="resnet18", in_channels=3, task="multilabel", num_labels=3, loss="bce"),
        partial(loader, "multilabel"),
    ),
    Client(
        "torchgeo SemanticSegmentationTask",
        "one class per pixel",
        ["torchgeo", "segmentation-models-pytorch"],
        partial(SemanticSegmentationTask, model="unet", backbone="resnet18", in_channels=3, num_classes=3),
        partial(loader, "segmentation"),
    ),
    Client(
        "torchgeo PixelwiseRegressionTask",
        "one number per pixel",
        ["torchgeo", "segmentation-models-pytorch"],
        partial(PixelwiseRegressionTask, model="unet", backbone="resnet18", in_channels=3),
        partial(loader, "depth"),
    ),
]
