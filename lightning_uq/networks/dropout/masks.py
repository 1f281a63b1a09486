"""Masks that are a function of a seed, the number of a call, and the position of an entry."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def keep_mask(index: Tensor, call: int, shape: Sequence[int], rate: float) -> Tensor:
    """The mask of the entries that a dropout keeps: True with probability 1 - ``rate``, [Z, *shape].

    Args:
        index: Seeds [Z].
        call: The number of the dropout's call, in the order of calls.
        shape: Shape of one index's mask.
        rate: Probability of dropping.

    Example:
        >>> keep_mask(torch.tensor([1, 2, 1]), 0, [4], 0.5)[0].equal(keep_mask(torch.tensor([1]), 0, [4], 0.5)[0])
        True
    """
    # Not a `torch.Size`, which would make the batch size a constant of an exported graph.
    entries = torch.arange(math.prod(shape), device=index.device).reshape(*shape)
    keys = _hash(_hash(index) ^ (call + 1)).reshape(-1, *[1] * len(shape))
    return _hash(_hash(entries) ^ keys) >= round(rate * 2**32)


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an integer, as int64 (Wellons' ``lowbias32``)."""
    x = (x ^ (x >> 32)) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
