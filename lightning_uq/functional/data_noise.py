"""Noise on the data that depends on the sample and the index, which makes the hypotheses of an epistemic network differ.

For a member number or a seed, the noise is a hash of (seed, z, sample). For a Gaussian vector z, it must be a smooth function of z,
or no network could learn it: each sample has fixed Gaussian signatures b and c, and the noise is a function of the products b.z and
c.z. Both kinds are the same in every epoch, batch, order, rank and device.

Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924), and ``enn.data_noise`` of
google-deepmind/enn, which draws from another generator.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import Bootstrap, counter_uniform
from lightning_uq.functional.hashing import chain
from lightning_uq.functional.precision import upcast, wide_dtype
from lightning_uq.functional.validation import check_choice, check_floating, check_integer

IndexDistribution = Literal["gaussian", "scaled", "unit"]
"""Distributions of Gaussian indices: N(0, I); N(0, I / D); (1, N(0, I / (D - 1)))."""

_KINDS: dict[str, tuple[str, ...]] = {
    "gaussian": ("bernoulli", "exponential"),
    "scaled": ("bernoulli", "exponential"),
    "unit": ("bernoulli",),
}


def gaussian_signatures(index: Tensor, dim: int, seed: int = 0, *, stream: int = 0) -> Tensor:
    """Standard normal vectors [B, dim] in float64, one per sample: a hash of (seed, stream, dimension, sample).

    Args:
        index: Positions [B] of the samples in the data set, integers.
        dim: Size of a signature.
        seed: Selects one realisation of the noise.
        stream: Number of one of several independent signatures with the same seed.

    Raises:
        InputError: ``index`` is not integers [B], or ``dim`` is below 1.

    Example:
        >>> b = gaussian_signatures(torch.arange(4), 3)
        >>> torch.equal(gaussian_signatures(torch.tensor([2, 0]), 3), b[[2, 0]])
        True
    """
    check_integer("dim", dim, 1)
    normal: Tensor = torch.special.ndtri(counter_uniform(index, dim, _stream_seed(seed, stream)))
    return normal.T


def gaussian_bootstrap_weights(
    z: Tensor,
    signature: Tensor,
    second_signature: Tensor | None = None,
    *,
    kind: Bootstrap = "bernoulli",
    distribution: IndexDistribution = "gaussian",
) -> Tensor:
    """Bootstrap weights [Z, B] for Gaussian indices.

    ``"bernoulli"``: 1 + sign(b.z), which is 0 or 2. ``"exponential"``: ((b.z)^2 + (c.z)^2) / 2; for z ~ N(0, I), b and c are first
    divided by sqrt(D). The mean over samples and indices is 1. The mean over the indices alone is 1 for a Bernoulli weight, and about 1
    for an exponential one. Indices with a unit support only Bernoulli weights, and there a sample's own mean depends on its signature,
    because the unit adds b_1 to each product.

    Args:
        z: Indices [Z, D].
        signature: b [B, D], standard normal numbers from :func:`gaussian_signatures`.
        second_signature: c [B, D], for ``"exponential"``.
        kind: ``"none"``, ``"bernoulli"`` or ``"exponential"``.
        distribution: Distribution of z: ``"gaussian"`` is N(0, I), ``"scaled"`` is N(0, I / D) and ``"unit"`` is
            (1, N(0, I / (D - 1))).

    Raises:
        InputError: A shape or the distribution is wrong, or ``kind`` is not defined for the distribution.

    Example:
        >>> b = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> gaussian_bootstrap_weights(torch.tensor([[0.5, 1.0]]), b)
        tensor([[2., 0.]])
    """
    check_choice("distribution", distribution, tuple(_KINDS))
    z, signature = _check_signature(z, signature, z.shape[-1])
    if kind == "none":
        return z.new_ones(len(z), len(signature))
    if kind not in _KINDS[distribution]:
        known = " and ".join(repr(name) for name in _KINDS[distribution])
        raise InputError(
            f"`kind` must be {known} for Gaussian indices of the distribution {distribution!r}, but it is "
            f"{kind!r}. Members of an ensemble support every kind."
        )
    first = z @ signature.T
    if kind == "bernoulli":
        return 1 + first.sign()
    if second_signature is None:
        raise InputError("kind='exponential' needs `second_signature`, but it is None.")
    _, second_signature = _check_signature(z, second_signature, z.shape[-1], "second_signature")
    squares = first.square() + (z @ second_signature.T).square()
    return 0.5 * (squares / z.shape[-1] if distribution == "gaussian" else squares)


def gaussian_target_noise(
    z: Tensor, signature: Tensor, std: float, *, distribution: IndexDistribution = "gaussian"
) -> Tensor:
    """Gaussian noise on the targets for Gaussian indices: std b.z, [Z, B].

    For N(0, I), the signature b is scaled to length 1, so that a sample's noise has variance std^2 over z. For the other
    distributions z has a length of about 1, and b is not scaled. The unit does not contribute.

    Args:
        z: Indices [Z, D].
        signature: b [B, D] of standard normal numbers from :func:`gaussian_signatures`; [B, D - 1] for ``"unit"``. With
            [B, K, D] there are K targets per sample, each with separate noise, and the result is [Z, B, K].
        std: Standard deviation of the noise, in units of the target.
        distribution: See :func:`gaussian_bootstrap_weights`.

    Raises:
        InputError: A shape or the distribution is wrong, or ``std`` is negative.

    Example:
        >>> gaussian_target_noise(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), std=0.5)
        tensor([[2.]])
    """
    check_choice("distribution", distribution, tuple(_KINDS))
    _check_std(std)
    check_floating("z", z, 2, "[Z, D]")
    if distribution == "unit":
        z = z[:, 1:]
    z, signature = _check_signature(z, signature, z.shape[-1])
    if distribution == "gaussian":
        signature = torch.nn.functional.normalize(signature, dim=-1)
    return std * torch.einsum("zd,b...d->zb...", z, signature)


def member_target_noise(
    index: Tensor, members: int | Tensor, std: float, seed: int = 0, *, num_targets: int = 1
) -> Tensor:
    """Gaussian noise on the targets for member numbers or seeds, [M, B, K]: independent N(0, std^2).

    Args:
        index: Positions [B] of the samples in the data set, integers.
        members: M for the members 0 to M - 1, or their numbers [M].
        std: Standard deviation, in units of the target.
        seed: Selects one realisation of the noise.
        num_targets: K, the number of targets per sample.

    Raises:
        InputError: The indices are not integers, or ``std`` is negative.

    Example:
        >>> noise = member_target_noise(torch.arange(1000), 5, std=0.1)
        >>> noise.shape, round(noise.std().item(), 2)
        (torch.Size([5, 1000, 1]), 0.1)
    """
    _check_std(std)
    check_integer("num_targets", num_targets, 1)
    uniform = [counter_uniform(index, members, _stream_seed(seed, _TARGETS + k)) for k in range(num_targets)]
    normal: Tensor = torch.special.ndtri(torch.stack(uniform, 2))
    return (std * normal).to(wide_dtype(index.device)).to(index.device)


_TARGETS = 2  # the first stream that the bootstrap does not use


def _stream_seed(seed: int, stream: int) -> int:
    """A seed different from those of the bootstrap of ``seed`` and of other streams."""
    return chain(seed, stream, 0) >> 1


def _check_signature(z: Tensor, signature: Tensor, dim: int, name: str = "signature") -> tuple[Tensor, Tensor]:
    check_floating("z", z, 2, "[Z, D]")
    check_floating(name, signature, 2, "[B, D]")
    if z.ndim != 2 or signature.shape[-1] != dim:
        raise InputError(
            f"`{name}` must end in an axis of {dim}, that of the indices [Z, {dim}], but its shape is "
            f"{list(signature.shape)} with z of shape {list(z.shape)}."
        )
    z = upcast(z)
    return z, signature.to(z)


def _check_std(std: float) -> None:
    if isinstance(std, bool) or not isinstance(std, int | float) or not (math.isfinite(std) and std >= 0):
        raise InputError(f"`std` must be a finite number of at least 0, but it is {std!r}.")
