"""Small synthetic problems: two moons to classify, and a one-dimensional curve to regress."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.errors import InputError


def two_moons(
    num_points: int, noise: float = 0.1, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles in the plane.

    Args:
        num_points: Number of points N; the first class has one more point if N is odd.
        noise: Standard deviation of the Gaussian noise on both coordinates.
        generator: Source of randomness.

    Returns:
        Points [N, 2] in random order and their classes [N], 0 or 1.

    Example:
        >>> x, y = two_moons(5, generator=torch.Generator().manual_seed(0))
        >>> x.shape, y.bincount()
        (torch.Size([5, 2]), tensor([3, 2]))
    """
    _check_counts(num_points=num_points)
    y = (torch.arange(num_points) % 2)[torch.randperm(num_points, generator=generator)]
    angle = math.pi * torch.rand(num_points, generator=generator)
    sign = 1 - 2 * y
    x = torch.stack([y + sign * angle.cos(), y / 2 + sign * angle.sin()], 1)
    return x + noise * torch.randn(num_points, 2, generator=generator), y


def toy_curve(num_points: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A cubic on [-4, 4] with noise of standard deviation 3, the toy regression of the deep-ensembles literature.

    Args:
        num_points: Number of points N.
        generator: Source of randomness.

    Returns:
        Inputs x [N, 1], uniform on [-4, 4], and targets x^3 + e [N, 1] with e normal of standard deviation 3.

    Source: Hernandez-Lobato & Adams, ICML 2015 (arXiv 1502.05336); Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).

    Example:
        >>> x, y = toy_curve(20, generator=torch.Generator().manual_seed(0))
        >>> x.shape, y.shape
        (torch.Size([20, 1]), torch.Size([20, 1]))
    """
    _check_counts(num_points=num_points)
    x = 8 * torch.rand(num_points, 1, generator=generator) - 4
    return x, x**3 + 3 * torch.randn(num_points, 1, generator=generator)


class ToyCurveDataModule(LightningDataModule):
    """Training, validation and test data from :func:`toy_curve`, in units in which x and y have about unit variance.

    Args:
        num_train: Number of training points; validation and test have ``num_test`` each.
        num_test: Number of validation points, and of test points.
        seed: Seed of the points and of the order of the training batches.
        batch_size: Samples per batch.

    Attributes:
        scale: The divisors of x and y.

    Example:
        >>> x, y = next(iter(ToyCurveDataModule(batch_size=5).train_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([5, 1]), torch.Size([5, 1]))
    """

    scale = (4 / math.sqrt(3), 64 / math.sqrt(7))

    def __init__(self, num_train: int = 200, num_test: int = 200, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        _check_counts(num_train=num_train, num_test=num_test, batch_size=batch_size)
        self.batch_size = batch_size
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._parts = {}
        for part, size in (("train", num_train), ("val", num_test), ("test", num_test)):
            x, y = toy_curve(size, generator=generator)
            self._parts[part] = TensorDataset(x / self.scale[0], y / self.scale[1])

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, in an order determined by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self._parts["train"], batch_size=self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return DataLoader(self._parts["val"], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return DataLoader(self._parts["test"], batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches again."""
        return self.test_dataloader()


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"`{name}` must be at least 1, but it is {count}.")
