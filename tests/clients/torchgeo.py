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


def client(name: str, predicts: str, kind: str, build: Any, task: str | None = None, **further: Any) -> Client:
    """One of torchgeo's tasks; ``task`` is what it predicts where that is not one class per input."""
    asked = ("EnsembleModule", "FitGMM", "FitKNN", "TemperatureScaling", "OODDetection", "EpinetModule", "load_fitted")
    target = Scenes(kind, "train").name
    return Client(
        f"torchgeo {name}",
        predicts,
        ["torchgeo", "segmentation-models-pytorch" if target == "mask" else "timm"],
        build,
        partial(loader, kind),
        lines={**({} if task is None else dict.fromkeys(asked, f"task={task}")), **further.pop("lines", {})},
        target_of=lambda batch: batch[target],
        input_of=lambda batch: batch["image"],
        **further,
    )


RESNET = partial(ClassificationTask, model="resnet18", in_channels=3)
UNET = {"model": "unet", "backbone": "resnet18", "in_channels": 3}

CLIENTS = [
    client("ClassificationTask", "one class per image", "multiclass", partial(RESNET, num_classes=3)),
    client(
        "ClassificationTask, binary",
        "one logit per image",
        "binary",
        partial(RESNET, task="binary", loss="bce"),
        lines={"EpinetModule": "task=Binary()"},
    ),
    client(
        "ClassificationTask, multilabel",
        "several labels per image",
        "multilabel",
        partial(RESNET, task="multilabel", num_labels=3, loss="bce"),
        lines={"EpinetModule": "task=Multilabel()"},
    ),
    client(
        "SemanticSegmentationTask",
        "one class per pixel",
        "segmentation",
        partial(SemanticSegmentationTask, **UNET, num_classes=3),
        "Segmentation()",
        lines={"FitGMM": 'task=Segmentation(), pool="positions"', "PredictionWriter": 'format="npz"'},
    ),
    client(
        "PixelwiseRegressionTask",
        "one number per pixel",
        "depth",
        partial(PixelwiseRegressionTask, **UNET),
        'PixelRegression(head="mean")',
        lines={"PredictionWriter": 'format="npz"'},
        refused={
            "TemperatureScaling": "calibrates probabilities",
            "OODDetection": "has no score for a single network",
        },
    ),
]
