"""Bootstrap weights that belong to a sample: a function of (seed, member, sample index) and of nothing else."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError

Bootstrap = Literal["none", "bernoulli", "exponential", "poisson"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_MASK = (1 << 64) - 1
# P(N <= k) of N ~ Poisson(1), up to where float64 reaches 1.
_POISSON = [sum(math.exp(-1) / math.factorial(j) for j in range(k + 1)) for k in range(19)]


def bootstrap_weights(
    index: Tensor, num_members: int, seed: int, kind: Bootstrap, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [M, B] of the samples in every member's loss, each of mean 1.

    A weight is a hash of (seed, member, sample index): the same in every epoch, batch, order, rank and device, as a
    bootstrap needs. Weights drawn anew at every step would be noise that averages out.

    Args:
        index: Positions [B] of the samples in the data set, integers.
        num_members: M.
        seed: Which bootstrap.
        kind: ``"bernoulli"`` (2 * Bernoulli(1/2): 0 or 2), ``"exponential"`` (Exp(1), the Bayesian bootstrap without its
            normalisation), ``"poisson"`` (Poisson(1), the limit of drawing n of n with replacement), or ``"none"`` (1).
        dtype: Type of the weights.

    Raises:
        InputError: ``index`` is not [B] of integers, or ``kind`` is unknown.

    Source: Osband et al., arXiv 2107.08924 (Bernoulli and exponential weights); Rubin, "The Bayesian Bootstrap", 1981;
    the hash is the finaliser of Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Example:
        >>> bootstrap_weights(torch.tensor([0, 1, 2, 3]), 2, seed=1, kind="bernoulli")
        tensor([[2., 0., 2., 0.],
                [0., 2., 2., 2.]])
    """
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise InputError(
            f"Expected argument `index` to be sample positions [B], integers, but got {index.dtype} of shape "
            f"{list(index.shape)}."
        )
    if kind == "none":
        return torch.ones(num_members, len(index), dtype=dtype, device=index.device)
    uniform = counter_uniform(index, num_members, seed)
    if kind == "bernoulli":
        weights = 2.0 * (uniform < 0.5)
    elif kind == "exponential":
        weights = -uniform.log()
    elif kind == "poisson":
        weights = torch.bucketize(uniform, torch.tensor(_POISSON, dtype=torch.float64, device=index.device), right=True)
    else:
        raise InputError(
            f"Expected argument `bootstrap` to be 'none', 'bernoulli', 'exponential' or 'poisson', but got {kind!r}."
        )
    return weights.to(dtype)


def counter_uniform(index: Tensor, num_members: int, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [M, B], hashed from (seed, member, index).

    Example:
        >>> bool((counter_uniform(torch.arange(4), 3, seed=1)[:, 2:] == counter_uniform(torch.tensor([2, 3]), 3, 1)).all())
        True
    """
    keys = torch.tensor([_signed(member_seed(seed, m, bits=64)) for m in range(num_members)], device=index.device)
    z = keys[:, None] + (index.long() + 1) * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    # The upper 53 bits fill a float64; the half keeps 0 and 1 out.
    return (_shift(z ^ _shift(z, 31), 11).double() + 0.5) * 2.0**-53


def member_seed(seed: int, member: int, bits: int = 32) -> int:
    """The seed of one member, hashed from (seed, member): ensembles of neighbouring seeds share none.

    Example:
        >>> len({member_seed(seed, member) for seed in range(10) for member in range(10)})
        100
    """
    z = 0
    for value in (seed, member):
        z = (z + value + 1) * _GOLDEN & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        z ^= z >> 31
    return z >> (64 - bits)


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits, whose products wrap around alike."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of an int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
