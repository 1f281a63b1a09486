"""CIFAR-10 and its out-of-distribution sets as OpenOOD v1.5 has them, as bytes on the device that trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from image_sets import images
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset

OOD_SETS = ("cifar100", "mnist", "fashion", "kmnist")
"""Near: CIFAR-100. Far: MNIST. FashionMNIST and KMNIST are no part of OpenOOD."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(Dataset[Any]):
    """Images [N, 3, 32, 32] in uint8 with labels [N], read by the batch."""

    def __init__(self, x: Tensor, y: Tensor, device: str) -> None:
        self.x, self.targets = x.to(device), y.to(device)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.targets[row]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows, device=self.x.device)
        return self.x[chosen], self.targets[chosen]

    def loader(self, batch_size: int = 500, *, shuffle: bool = False) -> DataLoader[Any]:
        """Batches (x, y)."""
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def load(root: str | Path, device: str, limit: int | None) -> dict[str, Images]:
    """The sets by name: ``train``, ``val``, ``test`` and those of OOD_SETS; at most ``limit`` images of each.

    As in OpenOOD, all 50,000 training images train, and 1,000 of the test images are for validation. Its lists of files are not at hand, so
    a fixed random state chooses the 1,000, and as many of CIFAR-100, which are left out. All 70,000 images of MNIST are test images.
    """
    held, rest = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).split([1000, 9000])
    x, y = images("cifar10", root)
    found = {"train": images("cifar10", root, train=True), "val": (x[held], y[held]), "test": (x[rest], y[rest])}
    found["cifar100"] = tuple(part[rest] for part in images("cifar100", root))
    parts = [images("mnist", root, train=train) for train in (False, True)]
    found["mnist"] = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    found |= {name: images(name, root) for name in ("fashion", "kmnist")}
    return {name: Images(resized(x[:limit]), y[:limit], device) for name, (x, y) in found.items()}


def resized(x: Tensor) -> Tensor:
    """Images of 32 x 32 pixels with three channels, by bilinear interpolation."""
    if x.shape[-1] != 32:
        x = interpolate(x.float(), size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return x.expand(-1, 3, -1, -1).contiguous()


def augmented(x: Tensor) -> Tensor:
    """Half of the images mirrored, and each moved by up to four pixels into black ones."""
    B = len(x)
    mirrored = torch.rand(B, device=x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(9, (2, B, 1), device=x.device) + torch.arange(32, device=x.device)
    rows = torch.arange(B, device=x.device)[:, None, None]
    return pad(x, (4, 4, 4, 4))[rows, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def normalized(x: Tensor) -> Tensor:
    """Images in uint8 as floats of about mean 0 and variance 1."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
