"""SplitMix64: random numbers as a hash of their keys, the same in any order, batch, rank and device.

Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.functional.precision import to_float64

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd."""

_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """An unsigned 64-bit number as the int64 with the same bits, whose products wrap around in the same way."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64; torch's shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def finalize(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64."""
    z = (z ^ shift(z, 30)) * signed(_FIRST)
    z = (z ^ shift(z, 27)) * signed(_SECOND)
    return z ^ shift(z, 31)


def mix(x: Tensor) -> Tensor:
    """One step of SplitMix64 from the state ``x``, int64."""
    return finalize(x + signed(GOLDEN))


def chain(*values: int) -> int:
    """64 unsigned bits from a sequence of integers, computed with Python integers."""
    z = 0
    for value in values:
        z = (z + value + 1) * GOLDEN & _MASK
        z = (z ^ z >> 30) * _FIRST & _MASK
        z = (z ^ z >> 27) * _SECOND & _MASK
        z ^= z >> 31
    return z


def chain_last(start: int, last: Tensor) -> Tensor:
    """:func:`chain` of sequences that end in each of ``last``, given the result ``start`` of their common beginning."""
    return finalize((last.long() + signed((start + 1) & _MASK)) * signed(GOLDEN))


def to_uniform(bits: Tensor) -> Tensor:
    """Numbers in (0, 1) from 64 bits, in float64 (on the CPU if the device has none); rounding never gives 0 or 1."""
    return ((to_float64(shift(bits, 11)) + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)


def rows_to_uniform(rows: Tensor) -> Tensor:
    """A number u in [0, 1) per row x of numbers [N, C], spread evenly over different rows: [N] in float64.

    u is the fractional part of 1024 / sqrt(C) sum_c a_c x_c with fixed a_c in (-1, 1), so rows that differ only by rounding, such as
    one input in two batches, have almost equal numbers. Infinities count as 0.

    Example:
        >>> one, other = rows_to_uniform(torch.tensor([[0.1, 0.9]])), rows_to_uniform(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
        >>> bool(one[0] == other[1]), bool(one[0] == other[0])
        (True, False)
    """
    x = to_float64(rows).nan_to_num(0.0, 0.0, 0.0)
    a = 2 * to_uniform(mix(torch.arange(x.shape[1], device=x.device))) - 1
    return (1024 / math.sqrt(x.shape[1]) * (a * x).sum(1)).remainder(1.0)


def to_normal(seeds: Tensor, size: int) -> Tensor:
    """Standard normal numbers [Z, size] in float32 from seeds [Z], by SplitMix64 and the Box-Muller transform.

    The bits are equal on every device, and the numbers up to rounding. Their absolute values are at most 6.8.
    """
    states = mix(seeds.long()).unsqueeze(1)
    bits = mix(states + torch.arange(-(-size // 2), device=seeds.device) * signed(GOLDEN))
    # Each 64 bits give two numbers.
    high, low = shift(bits, 32).float(), (bits & 0xFFFFFFFF).float()
    radius = (-2 * ((high + 0.5) * 2.0**-32).log()).sqrt()
    angle = low * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]
