"""Reads torchvision's image data sets from their files as tensors."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError, MissingExtraError

MNIST_SHAPE, CIFAR_SHAPE = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Source:
    """A torchvision data set: its class, and the properties of its images."""

    torchvision_name: str
    num_classes: int
    image_shape: tuple[int, int, int]


SOURCES = {
    "mnist": Source("MNIST", 10, MNIST_SHAPE),
    "fashion_mnist": Source("FashionMNIST", 10, MNIST_SHAPE),
    "kmnist": Source("KMNIST", 10, MNIST_SHAPE),
    "cifar10": Source("CIFAR10", 10, CIFAR_SHAPE),
    "cifar100": Source("CIFAR100", 100, CIFAR_SHAPE),
    "svhn": Source("SVHN", 10, CIFAR_SHAPE),
}


def load_images(name: str, root: str | Path, *, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """An official training or test set as tensors, read by torchvision from its files under ``root``.

    Args:
        name: ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``, ``cifar100`` or ``svhn``.
        root: Folder of the files; only the requested one of the two sets needs to exist.
        train: Whether to load the training set rather than the test set.
        download: Whether torchvision may download missing files.

    Returns:
        Images [N, C, H, W] in uint8 and labels [N] in int64.

    Raises:
        InputError: The name is unknown, or files are missing or damaged.
        MissingExtraError: SVHN needs scipy, which is not installed.

    Example:
        >>> load_images("mnist", "nowhere", train=False)
        Traceback (most recent call last):
            ...
        lightning_uq.errors.InputError: The test files of MNIST must be in nowhere, in torchvision's layout, but \
torchvision reports: Dataset not found. You can use download=True to download it
    """
    if name not in SOURCES:
        raise InputError(f"`name` must be one of {', '.join(SOURCES)}, but it is {name!r}.")
    datasets: Any = importlib.import_module("torchvision.datasets")
    base = getattr(datasets, SOURCES[name].torchvision_name)
    # Torchvision needs the files of both sets, and this subclass needs one. It has the same name, which is also that of the folder.
    if issubclass(base, datasets.MNIST):
        needed: dict[str, Any] = {"resources": base.resources[:2] if train else base.resources[2:]}
    elif name == "svhn":
        needed = {}
    else:
        needed = {"test_list": []} if train else {"train_list": []}
    chosen: Any = type(base.__name__, (base,), needed)
    which: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        dataset = chosen(str(root), **which, download=download)
    except ImportError as error:
        raise MissingExtraError(
            f"Reading {base.__name__} needs scipy. Install the extra `data`: pip install 'lightning-uq[data]'."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"The {'training' if train else 'test'} files of {base.__name__} must be in {root}, in torchvision's "
            f"layout, but torchvision reports: {error}"
        ) from error
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if name == "svhn" else dataset.targets
    return images.contiguous(), torch.as_tensor(labels).long()
