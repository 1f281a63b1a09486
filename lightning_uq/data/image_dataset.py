"""Images in memory: split into training and validation, augmentation and normalization."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

VAL_SHARE = 0.1
"""Share of the official training set for validation."""


def shuffled_split(num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and validation samples, as in the DDU code: the first tenth of a shuffle is for validation.

    Args:
        num_images: Size N of the official training set.
        seed: Seed of numpy's legacy generator; the global generator is not used.

    Returns:
        Training and validation indices, together all of 0 ... N-1.

    Source: Mukhoti et al. (arXiv 2102.11582), its loaders (``np.random.seed``, ``np.random.shuffle``).

    Example:
        >>> shuffled_split(10, seed=1)
        (tensor([9, 6, 4, 0, 3, 1, 7, 8, 5]), tensor([2]))
    """
    order = np.arange(num_images)
    np.random.RandomState(seed).shuffle(order)  # the legacy generator, to reproduce its splits
    num_val = int(VAL_SHARE * num_images)
    indices = torch.from_numpy(order)
    return indices[num_val:], indices[:num_val]


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, augmented and normalized one batch at a time.

    Args:
        images: Images [N, C, H, W], uint8 in 0 ... 255 or floating point in 0 ... 1: a tensor, or an object that returns one for rows [n].
        labels: Labels [S] of the samples.
        mean: Mean of each channel, in units of images in 0 ... 1.
        std: Standard deviation of each channel.
        rows: The index of each sample's image [S]; by default, sample i shows image i.
        augment: Whether to shift each image by up to 4 pixels, with a border of zeros, and to mirror half of them, randomly at each access.

    Example:
        >>> data = ImageDataset(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 1]), [0.5], [0.25])
        >>> x, y = data[1]
        >>> x.shape, x.mean().item(), y.item()
        (torch.Size([1, 4, 4]), 2.0, 1)
    """

    def __init__(
        self,
        images: Any,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        rows: Tensor | None = None,
        augment: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """All samples of a batch at once, for a DataLoader."""
        chosen = torch.as_tensor(indices)
        x = self.images[self.rows[chosen]]
        if self.augment:
            x = shift_and_mirror(x)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return list(zip((x - self.mean) / self.std, self.labels[chosen], strict=True))


def shift_and_mirror(x: Tensor, reach: int = 4) -> Tensor:
    """A random crop of each image [B, C, H, W], padded with zeros by ``reach``, half of them mirrored."""
    batch, channels, height, width = x.shape
    top, left = torch.randint(2 * reach + 1, (2, batch, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    return F.pad(x, [reach] * 4)[
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(channels).view(1, -1, 1, 1),
        rows.view(batch, 1, height, 1),
        columns.view(batch, 1, 1, width),
    ]
