"""Bootstrap weights of samples, which depend only on (seed, member, sample index)."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.hashing import GOLDEN, chain, chain_last, finalize, signed, to_uniform
from lightning_uq.functional.validation import check_choice

Bootstrap = Literal["none", "bernoulli", "exponential", "poisson", "uniform"]

# P(N <= k) for N ~ Poisson(1), up to the k at which float64 reaches 1.
_POISSON = [sum(math.exp(-1) / math.factorial(j) for j in range(k + 1)) for k in range(19)]


def bootstrap_weights(
    index: Tensor, members: int | Tensor, seed: int, kind: Bootstrap, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [M, B] of the samples in every member's loss, each with mean 1.

    A weight is a hash of (seed, member, sample index), so it is the same in every epoch, batch, order, rank and device, as a
    bootstrap requires. Weights drawn anew at every step would only be noise that averages out.

    Args:
        index: Positions [B] of the samples in the data set, integers.
        members: M for the members 0 to M - 1, or their numbers [M] (or other integer indices z, such as dropout's seeds).
        seed: Selects one bootstrap.
        kind: ``"bernoulli"`` (2 * Bernoulli(1/2): 0 or 2), ``"exponential"`` (Exp(1), the Bayesian bootstrap without its
            normalisation), ``"poisson"`` (Poisson(1), the limit of drawing n of n with replacement), ``"uniform"`` (uniform
            in (0, 2)), or ``"none"`` (1).
        dtype: Type of the weights.

    Raises:
        InputError: ``index`` is not integers [B], ``members`` is not a number or integers [M], or ``kind`` is unknown.

    Source: Osband et al., arXiv 2107.08924, and ``enn.data_noise``; Rubin, "The Bayesian Bootstrap", 1981; the hash is
    the finaliser of Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Example:
        >>> bootstrap_weights(torch.tensor([0, 1, 2, 3]), 2, seed=1, kind="bernoulli")
        tensor([[2., 0., 2., 0.],
                [0., 2., 2., 2.]])
    """
    check_positions("index", index, "sample positions [B]")
    check_choice("bootstrap", kind, ("none", "bernoulli", "exponential", "poisson", "uniform"))
    if kind == "none":
        size = members if isinstance(members, int) else len(members)
        return torch.ones(size, len(index), dtype=dtype, device=index.device)
    uniform = counter_uniform(index, members, seed)
    if kind == "bernoulli":
        weights = 2.0 * (uniform < 0.5)
    elif kind == "exponential":
        weights = -uniform.log()
    elif kind == "poisson":
        weights = torch.bucketize(uniform, uniform.new_tensor(_POISSON), right=True)
    else:
        weights = 2.0 * uniform
    return weights.to(dtype).to(index.device)


def counter_uniform(index: Tensor, members: int | Tensor, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [M, B], hashed from (seed, member, index).

    Example:
        >>> bool((counter_uniform(torch.arange(4), 3, seed=1)[:, 2:] == counter_uniform(torch.tensor([2, 3]), 3, 1)).all())
        True
    """
    if isinstance(members, int):
        members = torch.arange(members)
    check_positions("index", index, "sample positions [B]")
    check_positions("members", members, "member numbers [M]")
    keys = chain_last(chain(seed), members.to(index.device))
    return to_uniform(finalize(keys[:, None] + (index.long() + 1) * signed(GOLDEN)))


def member_seed(seed: int, member: int, bits: int = 32) -> int:
    """The seed of one member, hashed from (seed, member), so that ensembles with neighbouring seeds have no member in common.

    Example:
        >>> len({member_seed(seed, member) for seed in range(10) for member in range(10)})
        100
    """
    return chain(seed, member) >> (64 - bits)


def check_positions(name: str, value: Tensor, meaning: str) -> None:
    """Refuse values other than integers with one axis."""
    if not isinstance(value, Tensor):
        raise InputError(f"`{name}` must be {meaning}, integers, but it is a {type(value).__name__}.")
    if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool:
        raise InputError(f"`{name}` must be {meaning}, integers, but it is {value.dtype} of shape {list(value.shape)}.")
