"""Image sets by name, as uint8 tensors, from the files of torchvision under one folder.

notMNIST (``notMNIST10k/t10k-images-idx3-ubyte.gz``), Omniglot at 28 x 28 (``omniglot28/*.npz``), and CIFAR-100's test images as one sheet
(``cifar/cifar100_test.webp``) are no files of torchvision; they are read where they are there.
"""

import gzip
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_uq.data.image_files import load_images

NAMES = {"fashion": "fashion_mnist"}


def images(name: str, root: str | Path, *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in uint8 and labels [N]: ``mnist``, ``fashion``, ``kmnist``, ``notmnist``, ``omniglot``, ``cifar10``, ``cifar100``."""
    root = Path(root)
    if name == "notmnist":
        folder = root / "notMNIST10k"
        return _idx(folder / "t10k-images-idx3-ubyte.gz").unsqueeze(1), _idx(
            folder / "t10k-labels-idx1-ubyte.gz"
        ).long()
    if name == "omniglot":
        held = np.load(next((root / "omniglot28").glob("*.npz")))
        return torch.as_tensor(held["images"]).unsqueeze(1), torch.as_tensor(held["labels"]).long()
    if name == "cifar100" and not (root / "cifar-100-python").exists():
        held = np.load(root / "cifar" / "cifar100_test_index.npz")
        return _sheet(root / "cifar" / "cifar100_test.webp"), torch.as_tensor(held["labels"]).long()
    if name == "cifar10":
        return _pickled(sorted((root / "cifar-10-batches-py").glob("data_batch_*" if train else "test_batch")))
    return load_images(NAMES.get(name, name), root, train=train)


def like(x: Tensor, other: Tensor) -> Tensor:
    """Images [N, C, H, W] with the channels and the size of others: grey ones repeated, smaller ones padded with their darkest value."""
    x = x.expand(-1, other.shape[1], -1, -1)
    height, width = other.shape[2] - x.shape[2], other.shape[3] - x.shape[3]
    return torch.nn.functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def _pickled(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """CIFAR-10's batches, in any order of their images: torchvision takes the published order alone."""
    batches = [pickle.loads(path.read_bytes(), encoding="latin1") for path in paths]
    x = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return torch.as_tensor(x), torch.tensor([label for batch in batches for label in batch["labels"]])


def _idx(path: Path) -> Tensor:
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    return torch.as_tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _sheet(path: Path) -> Tensor:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    sheet = torch.as_tensor(np.asarray(Image.open(path).convert("RGB")).copy())
    return sheet.reshape(100, 32, 100, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
