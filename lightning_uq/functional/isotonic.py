"""Isotonic calibration: one monotone curve per class, from its probability to its frequency among held-out rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.functional.calibration_rows import calibration_rows, warn_of_missing_classes

_PART_ELEMENTS = 2**17  # number of scores fitted at a time


def apply_isotonic(log_probs: Tensor, class_curves: Tensor) -> Tensor:
    """log(f_c(log p_c) / sum_k f_k(log p_k)): log-probabilities [N, C, ...] -> [N, C, ...].

    The curve f_c is linear between its knots and constant beyond them. A class that a row excludes by minus infinity stays
    excluded. NaN stays NaN.

    Args:
        log_probs: Log-probabilities [N, C, ...].
        class_curves: Knots and values [2, C, K] from :func:`fit_isotonic`.

    Example:
        >>> curves = torch.tensor([[[-1.0, 0.0], [-1.0, 0.0]], [[0.2, 0.8], [0.2, 0.4]]])
        >>> apply_isotonic(torch.tensor([[0.0, -5.0]]), curves).exp()
        tensor([[0.8000, 0.2000]])
    """
    _, C, K = class_curves.shape
    knots, values = class_curves.flatten(1)
    excluded = log_probs == -math.inf
    x = log_probs.masked_fill(excluded, 0.0)
    first = (torch.arange(C, device=x.device) * K).reshape(-1, *[1] * (x.ndim - 2))
    left = (
        torch.zeros_like(x, dtype=torch.long) + first
    )  # the last knot at or below x, or the first knot if x is below all
    for size in (2**power for power in reversed(range((K - 1).bit_length()))):
        further = torch.minimum(left + size, first + K - 1)
        left = torch.where(knots[further] <= x, further, left)
    right = torch.minimum(left + 1, first + K - 1)
    width = knots[right] - knots[left]
    weight = ((x - knots[left]) / torch.where(width > 0, width, 1.0)).clamp(0.0, 1.0)
    frequencies = values[left] + weight * (values[right] - values[left])
    return torch.log_softmax(frequencies.log().masked_fill(excluded, -math.inf), 1)


def fit_isotonic(logits: Tensor, target: Tensor) -> Tensor:
    """Fit a monotone curve per class, one class against the rest.

    The curve of class c is the non-decreasing function g of log p_c that minimises sum_n (g(log p_nc) - [y_n = c])^2. It is mixed
    with a uniform share as if from one more row, f = (N g + 1 / C) / (N + 1), so that no class gets probability 0, whose log-loss
    would be infinite. Such a flexible curve needs many rows: below some hundreds per class, a temperature is safer.

    Args:
        logits: Logits or log-probabilities [N, C] of held-out rows, or [N, C, ...] with each position as a row.
        target: Class indices [N] (or [N, ...]).

    Returns:
        Knots, as log-probabilities, and values in (0, 1): [2, C, K] in float64, both non-decreasing along K. Shorter curves repeat
        their last knot.

    Raises:
        InputError: Shapes or values are invalid, or there is no row.

    Warns:
        UserWarning: A class has no row.

    Source: Zadrozny & Elkan, KDD 2002; pooling of adjacent violators by Ayer et al., Annals of Mathematical Statistics 1955.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
        >>> knots, values = fit_isotonic(logits, torch.tensor([1, 0, 1, 0]))
        >>> values[0].round(decimals=2)  # 0, then one in two, then 1, each mixed with one fifth of 1 / 2
        tensor([0.1000, 0.5000, 0.5000, 0.9000], dtype=torch.float64)
    """
    rows, classes = calibration_rows(logits, target, 2)
    N, C = rows.shape[1:]
    warn_of_missing_classes(rows[0], classes)
    # Scores count as equal if a float32 prediction cannot distinguish them.
    scores = rows.new_empty(C, N, dtype=torch.float32)
    size = max(1, _PART_ELEMENTS // C)
    for part, logits_part in zip(torch.split(scores, size, 1), torch.split(rows[0], size), strict=True):
        part.copy_(torch.log_softmax(logits_part.double(), 1).T)
    # A few classes at a time, since a fit takes tens of numbers per score.
    together = max(1, _PART_ELEMENTS // N)
    curves = [
        _curves(part, classes == torch.arange(C, device=rows.device)[first : first + together, None], C)
        for first, part in zip(range(0, C, together), torch.split(scores, together), strict=True)
    ]
    K = max(part.shape[2] for part in curves)
    return torch.cat([torch.cat([part, part[:, :, -1:].expand(-1, -1, K - part.shape[2])], 2) for part in curves], 1)


def _curves(scores: Tensor, hits: Tensor, num_classes: int) -> Tensor:
    """Knots and values [2, c, K] of a few classes, from the scores [c, N] of rows and whether each row is of the class."""
    C, N = scores.shape
    x, order = scores.double().sort(1)
    hits = hits.to(x).gather(1, order)
    new = torch.ones_like(x, dtype=torch.bool)  # equal scores share one value
    new[:, 1:] = x[:, 1:] > x[:, :-1]
    block = _pool_adjacent_violators(
        new.flatten(), hits.flatten(), torch.arange(C, device=x.device).repeat_interleave(N)
    )

    total, num = (x.new_zeros(C * N).index_add(0, block, part) for part in (hits.flatten(), x.new_ones(C * N)))
    mean = total / num  # NaN after the last block
    value = ((N * mean + 1 / num_classes) / (N + 1))[block].reshape(C, N)
    # The knots of a block are its lowest score and, if different, its highest.
    ends = torch.ones(C * N + 1, dtype=torch.bool, device=x.device)
    ends[1:-1] = block[1:] != block[:-1]
    lowest, highest = ends[:-1], ends[1:]
    edge = (lowest | (highest & (x.flatten() > x.flatten()[lowest][block]))).reshape(C, N)
    num_knots = edge.sum(1)
    K = int(num_knots.max())
    place = (edge.cumsum(1) - 1).masked_fill(~edge, K)  # rows without a knot go to a column that is dropped
    curves = x.new_zeros(2, C, K + 1)
    curves[0].scatter_(1, place, x)
    curves[1].scatter_(1, place, value)
    column = torch.arange(K, device=x.device).minimum((num_knots - 1)[:, None])
    return curves.gather(2, column.expand(2, -1, -1))


def _pool_adjacent_violators(new: Tensor, hits: Tensor, group: Tensor) -> Tensor:
    """Assign rows, sorted by group and score, to blocks so that the mean number of hits rises from block to block.

    All neighbouring blocks whose means do not rise are pooled at once, until there are none, so the result is independent of order.

    Args:
        new: Whether a row has another score than the one before [M].
        hits: 0 or 1 [M], in float64: means are compared by products of integers, which are exact.
        group: The group of each row [M], within which rows are pooled.
    """
    block = new.long().cumsum(0) - 1
    owner = group[new]
    total, num = (hits.new_zeros(len(owner)).index_add(0, block, part) for part in (hits, torch.ones_like(hits)))
    while True:
        rises = (owner[1:] != owner[:-1]) | (total[1:] * num[:-1] > total[:-1] * num[1:])
        if bool(rises.all()):
            return block
        merged = torch.cat([rises.new_zeros(1), rises]).long().cumsum(0)
        block = merged[block]
        size = int(merged[-1]) + 1
        total, num = (hits.new_zeros(size).index_add(0, merged, part) for part in (total, num))
        owner = owner.new_zeros(size).scatter(0, merged, owner)
