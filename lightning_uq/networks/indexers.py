"""Reference distributions for the indices z of a network f(x, z)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.data_noise import IndexDistribution
from lightning_uq.functional.validation import check_integer, check_positive


class Indexer(ABC):
    """A distribution of indices. ``indexer(num_samples, generator)`` draws independent indices, stacked on axis 0.

    Attributes:
        distribution: Distribution of Gaussian vectors, needed for noise on the data. None for other vectors, which do not
            support such noise, and for integers, which do not need it. See :mod:`lightning_uq.functional.data_noise`.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924), and their code (``enn.networks``).
    """

    distribution: ClassVar[IndexDistribution | None] = None
    _drawn: tuple[tuple[int, int], Tensor] | None = None

    @property
    def num_indices(self) -> int | None:
        """Size of a finite index set, all of which training and evaluation use; None for an infinite set."""
        return None

    @property
    def mean_index(self) -> Tensor | None:
        """The index [index_dim] that represents the mean over all others; None if there is none."""
        return None

    @abstractmethod
    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` indices, from the global generator if ``generator`` is None."""

    def evaluation_index(self, num_samples: int, seed: int = 0) -> Tensor:
        """The indices for evaluation: all of a finite set, or else ``num_samples`` draws, the same in every call.

        The indices of a finite set are its numbers, 0 to ``num_indices`` - 1. A finite set of vectors overrides this method.

        Args:
            num_samples: Number of draws Z from an infinite index set. A finite set ignores it.
            seed: Seed of those draws.

        Raises:
            InputError: ``num_samples`` is below 1.
        """
        if self.num_indices is not None:
            return torch.arange(self.num_indices)
        check_integer("num_samples", num_samples, 1)
        key = (num_samples, seed)
        if self._drawn is None or self._drawn[0] != key:
            # The last draw is cached, so that an exported graph holds it as a constant. It is never an inference tensor, which
            # would not allow gradients later.
            with torch.inference_mode(False):
                self._drawn = key, self(num_samples, torch.Generator().manual_seed(seed))
        return self._drawn[1]

    def __repr__(self) -> str:
        public = ((name, value) for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in public)})"


class EnsembleIndexer(Indexer):
    """Member numbers [Z], uniform with replacement, so Z draws need not contain every member.

    Args:
        num_members: M; 1 for a single network.

    Example:
        >>> EnsembleIndexer(3)(5, torch.Generator().manual_seed(0))
        tensor([2, 0, 2, 0, 1])
    """

    def __init__(self, num_members: int) -> None:
        check_integer("num_members", num_members, 1)
        self.num_members = num_members

    @property
    def num_indices(self) -> int:
        """M."""
        return self.num_members

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Member numbers [Z]."""
        return torch.randint(self.num_members, (num_samples,), generator=generator)


class GaussianIndexer(Indexer):
    """z ~ N(0, I): [Z, index_dim].

    Args:
        index_dim: Dimension of z.

    Example:
        >>> GaussianIndexer(8)(100).shape
        torch.Size([100, 8])
    """

    distribution = "gaussian"

    def __init__(self, index_dim: int) -> None:
        check_integer("index_dim", index_dim, 1)
        self.index_dim = index_dim

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal vectors [Z, index_dim]."""
        return torch.randn(num_samples, self.index_dim, generator=generator)


class ScaledGaussianIndexer(Indexer):
    """z ~ index_scale / sqrt(index_dim) * N(0, I): [Z, index_dim], of mean squared length index_scale^2.

    Args:
        index_dim: Dimension of z.
        index_scale: Root mean square of the length of z.

    Raises:
        InputError: ``index_dim`` is below 1, or ``index_scale`` is not above 0 and finite.

    Example:
        >>> ScaledGaussianIndexer(8)(10_000, torch.Generator().manual_seed(0)).square().sum(1).mean()
        tensor(0.9995)
    """

    distribution = "scaled"

    def __init__(self, index_dim: int, index_scale: float = 1.0) -> None:
        check_integer("index_dim", index_dim, 1)
        self.index_dim = index_dim
        check_positive(index_scale=index_scale)
        self.index_scale = index_scale

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Normal vectors [Z, index_dim]."""
        z = torch.randn(num_samples, self.index_dim, generator=generator)
        return z * (self.index_scale / math.sqrt(self.index_dim))


class GaussianWithUnitIndexer(Indexer):
    """z = (1, N(0, I) / sqrt(index_dim - 1)): [Z, index_dim]; the first entry is the constant 1.

    Neither z nor its random part is normalized to a fixed length.

    Args:
        index_dim: Dimension of z, at least 2.

    Example:
        >>> indexer = GaussianWithUnitIndexer(3)
        >>> indexer(2)[:, 0], indexer.mean_index
        (tensor([1., 1.]), tensor([1., 0., 0.]))
    """

    distribution = "unit"

    def __init__(self, index_dim: int) -> None:
        check_integer("index_dim", index_dim, 2)
        self.index_dim = index_dim

    @property
    def mean_index(self) -> Tensor:
        """(1, 0, ..., 0) [index_dim]."""
        return torch.eye(1, self.index_dim)[0]

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Vectors [Z, index_dim] that begin with 1."""
        z = torch.randn(num_samples, self.index_dim - 1, generator=generator) / math.sqrt(self.index_dim - 1)
        return torch.cat([torch.ones(num_samples, 1), z], dim=1)


class DirichletIndexer(Indexer):
    """z ~ Dirichlet(concentration): [Z, K], each row a distribution over K members.

    Args:
        concentration: K positive numbers.

    Example:
        >>> z = DirichletIndexer([1.0, 1.0, 8.0])(10_000, torch.Generator().manual_seed(0))
        >>> z.mean(0).round(decimals=2)
        tensor([0.1000, 0.1000, 0.8000])
    """

    def __init__(self, concentration: Sequence[float] | Tensor) -> None:
        values = torch.as_tensor(concentration, dtype=torch.float32)
        if values.ndim != 1 or not len(values) or not bool((values > 0).all() and values.isfinite().all()):
            raise InputError(f"`concentration` must be positive numbers [K], but they are {values.tolist()}.")
        self.concentration: list[float] = values.tolist()

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Points of the simplex [Z, K]."""
        return torch._sample_dirichlet(torch.tensor(self.concentration).expand(num_samples, -1), generator)


class SeedIndexer(Indexer):
    """Seeds [Z], integers in [0, 2^31), for networks whose randomness is a function of a seed, such as dropout masks.

    Example:
        >>> SeedIndexer()(3).dtype
        torch.int64
    """

    def __call__(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Seeds [Z]."""
        return torch.randint(2**31, (num_samples,), generator=generator)

    def evaluation_index(self, num_samples: int, seed: int = 0) -> Tensor:
        """The seeds seed * 2^20 + (0, ..., num_samples - 1). Hashes of consecutive seeds are as random as any others."""
        check_integer("num_samples", num_samples, 1)
        return torch.arange(num_samples) + (seed << 20)
