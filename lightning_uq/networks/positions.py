"""Features at each position of a map: pixels, voxels, tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def position_rows(features: Tensor) -> Tensor:
    """Features [B, D, *P] as rows [B N, D], one per position of each sample; rows [B, D] do not change.

    Example:
        >>> position_rows(torch.zeros(2, 5, 3, 4)).shape
        torch.Size([24, 5])
    """
    return features if features.ndim == 2 else features.movedim(1, -1).flatten(0, -2)


def score_positions(score: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Scores [B] of features [M, B, D], or a map of scores [B, *P] of features [M, B, D, *P] at positions.

    Args:
        score: ``score(features [M, N, D])`` returns scores [N].
        features: The features of M members.

    Example:
        >>> score_positions(lambda rows: rows.sum((0, 2)), torch.ones(2, 5, 3, 4, 4)).shape
        torch.Size([5, 4, 4])
    """
    if features.ndim == 3:
        return score(features)
    rows = features.movedim(2, -1).flatten(1, -2)
    return score(rows).reshape(features.shape[1], *features.shape[3:])


def resized(values: Tensor, shape: Sequence[int]) -> Tensor:
    """A map [..., *P] on a grid of another ``shape``, where each position takes the value of the nearest one.

    Example:
        >>> resized(torch.tensor([[0, 1, 2, 3]]), [2]), resized(torch.tensor([5, 6]), [4])
        (tensor([[1, 3]]), tensor([5, 5, 6, 6]))
    """
    first = values.ndim - len(shape)
    for axis, size in enumerate(shape, first):
        found = values.shape[axis]
        if found != size:
            nearest = (2 * torch.arange(size, device=values.device) + 1) * found // (2 * size)
            values = values.index_select(axis, nearest)
    return values
