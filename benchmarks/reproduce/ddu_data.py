"""Dirty-MNIST and the four sets that ``ddu.py`` sets against it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from image_sets import images
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lightning_uq.data import DirtyMNISTDataModule

OOD_SETS = {"fashion": "FashionMNIST", "kmnist": "KMNIST", "notmnist": "notMNIST", "omniglot": "Omniglot"}


@dataclass(frozen=True)
class Data:
    """Dirty-MNIST and the other sets, normalized; samples share images.

    Attributes:
        train: Images [N, 1, 28, 28], the labels [S] of the samples, and the image [S] of each.
        test: As ``train``.
        num_clean: The first so many images of ``test``, and as many samples, are MNIST's.
        others: Images by name.
        source: Where the ambiguous digits come from.
    """

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    num_clean: int
    others: dict[str, Tensor]
    source: str


def load(root: Path) -> Data:
    """The sets from their files."""
    module = DirtyMNISTDataModule(str(root))
    (x, *train), (test_x, *test) = (module.load_samples(train=part) for part in (True, False))

    def normalized(x: Tensor) -> Tensor:
        return ((x.float() / 255 if x.dtype == torch.uint8 else x) - module.mean[0]) / module.std[0]

    others = {name: normalized(images(name, root)[0]) for name in OOD_SETS}
    parts = (normalized(x), *train), (normalized(test_x), *test)
    return Data(*parts, len(images("mnist", root)[1]), others, str(module.ambiguous_source))


class Samples(Dataset[Any]):
    """Batches of samples, which share images; labels are 0 where there are none."""

    def __init__(self, x: Tensor, y: Tensor | None = None, rows: Tensor | None = None) -> None:
        self.x = x
        self.y = torch.zeros(len(x), dtype=torch.long) if y is None else y
        self.rows = torch.arange(len(x)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[self.rows[batch]], self.y[batch]

    def loader(self, *, shuffle: bool = False) -> DataLoader[Any]:
        """All samples once."""
        order = RandomSampler(self) if shuffle else SequentialSampler(self)
        return DataLoader(self, batch_size=None, sampler=BatchSampler(order, 128, drop_last=False))
