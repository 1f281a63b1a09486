"""Noise on the data that depends on the index: values for a module's ``data_noise=``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import Bootstrap, bootstrap_weights
from lightning_uq.functional.data_noise import (
    IndexDistribution,
    gaussian_bootstrap_weights,
    gaussian_signatures,
    gaussian_target_noise,
    member_target_noise,
)
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_choice

_KINDS = ("none", "bernoulli", "exponential", "poisson", "uniform")


class DataNoise:
    """Noise that depends on (sample, index): weights of the samples in each index's loss, or targets for each index.

    A subclass overrides one or both of the two methods. Integer indices are member numbers or seeds. For vectors, the
    ``distribution`` of their indexer says how they are drawn.

    Attributes:
        of_targets: Whether the noise changes targets, which class labels do not allow.
    """

    of_targets: ClassVar[bool] = False

    def weights(self, sample: Tensor, index: Tensor, indexer: Any = None) -> Tensor | None:
        """Weights [Z, B] of samples [B] under indices [Z] or [Z, D]; None for weights of 1."""
        return None

    def targets(self, y: Tensor, sample: Tensor, index: Tensor, indexer: Any = None) -> Tensor:
        """Noisy targets [Z, B, D] of samples [B] with targets [B, D], or the targets unchanged if they get no noise."""
        return y


@dataclass(frozen=True)
class BootstrapNoise(DataNoise):
    """Bootstrap weights of the samples, by index; see :func:`~lightning_uq.functional.bootstrap.bootstrap_weights` and
    :func:`~lightning_uq.functional.data_noise.gaussian_bootstrap_weights`.

    Args:
        kind: ``"bernoulli"``, ``"exponential"``, ``"poisson"`` or ``"uniform"``. Gaussian indices support the first two, and
            those with a unit only the first. ``"none"`` leaves every weight at 1.
        seed: Selects one bootstrap.

    Raises:
        InputError: The kind is unknown, or the indices do not support it.

    Example:
        >>> BootstrapNoise("bernoulli", seed=1).weights(torch.arange(4), torch.arange(2))
        tensor([[2., 0., 2., 0.],
                [0., 2., 2., 2.]])
    """  # noqa: D205  # one sentence with two references

    kind: Bootstrap = "bernoulli"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _KINDS)

    def weights(self, sample: Tensor, index: Tensor, indexer: Any = None) -> Tensor:
        """Weights [Z, B]."""
        if not index.is_floating_point():
            return bootstrap_weights(sample, index, self.seed, self.kind)
        distribution, z = _read(index, indexer)
        b, c = (gaussian_signatures(sample, z.shape[1], self.seed, stream=stream) for stream in (0, 1))
        return gaussian_bootstrap_weights(z, b, c, kind=self.kind, distribution=distribution)


@dataclass(frozen=True)
class GaussianTargetNoise(DataNoise):
    """Gaussian noise on the targets of a regression, by index; see
    :func:`~lightning_uq.functional.data_noise.gaussian_target_noise`. Each target dimension has noise of its own.

    Args:
        std: Standard deviation, in units of the target.
        seed: Selects one realisation of the noise.

    Raises:
        InputError: ``std`` is not a number of at least 0.

    Example:
        >>> GaussianTargetNoise(0.1).targets(torch.zeros(4, 1), torch.arange(4), torch.arange(2)).shape
        torch.Size([2, 4, 1])
    """  # noqa: D205  # one sentence with a reference

    std: float
    seed: int = 0

    of_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        member_target_noise(torch.zeros(0, dtype=torch.long), 1, self.std)  # raises if `std` is invalid

    def targets(self, y: Tensor, sample: Tensor, index: Tensor, indexer: Any = None) -> Tensor:
        """Targets [Z, B, D] from targets [B, D]."""
        if not y.is_floating_point() or y.ndim != 2:
            raise InputError(
                f"GaussianTargetNoise needs floating-point targets [B, D] of a regression, but they are {y.dtype} of shape "
                f"{list(y.shape)}."
            )
        if not index.is_floating_point():
            noise = member_target_noise(sample, index, self.std, self.seed, num_targets=y.shape[1])
        else:
            distribution, z = _read(index, indexer)
            dim = z.shape[1] - (distribution == "unit")
            streams = range(_TARGETS, _TARGETS + y.shape[1])
            signatures = [gaussian_signatures(sample, dim, self.seed, stream=stream) for stream in streams]
            noise = gaussian_target_noise(z, torch.stack(signatures, 1), self.std, distribution=distribution)
        y = upcast(y)
        return y + noise.to(y)


_TARGETS = 2  # streams 0 and 1 belong to the bootstrap


def _read(index: Tensor, indexer: Any) -> tuple[IndexDistribution, Tensor]:
    """The distribution of the index vectors, and the vectors at that distribution's scale."""
    distribution: IndexDistribution | None = getattr(indexer, "distribution", None)
    if distribution is None:
        raise InputError(
            "Noise on the data needs a network whose indices are integers or come from a Gaussian indexer (its attribute "
            f"`indexer`), but they are vectors of {indexer!r}."
        )
    return distribution, index / getattr(indexer, "index_scale", 1.0)
