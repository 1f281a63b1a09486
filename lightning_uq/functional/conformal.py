"""The quantile of split conformal prediction: a threshold that a new row's score stays below with a given probability.

Scores are nonconformities: a higher score is a worse fit of a target to a prediction. The calibration rows must be exchangeable with the
new row, and the network must not have been fitted to them. Then P(new score <= threshold) >= 1 - alpha, and <= 1 - alpha + 1 / (n + 1) if no
scores are tied. A set or interval contains all targets whose score is at most the threshold.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import (
    check_class_indices,
    check_closed_unit,
    check_floating,
    check_integer,
    check_no_nan,
    check_shape,
    check_target_values,
)


def exact_fraction(alpha: float) -> Fraction:
    """The fraction that a rounded number represents, so that 1 - 0.9 and 0.1 give the same rank.

    Raises:
        InputError: ``alpha`` is not in [0, 1].

    Example:
        >>> exact_fraction(0.1), exact_fraction(1 - 0.9)
        (Fraction(1, 10), Fraction(1, 10))
    """
    check_closed_unit("alpha", alpha)
    return Fraction(alpha).limit_denominator(10**9)


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores: [N, ...] -> [...].

    The rank is computed exactly. If it exceeds n, no finite threshold has the coverage, and plus infinity is returned; n must be at
    least 1 / alpha - 1. With ``alpha`` = 1 the rank is 0, and minus infinity is returned.

    Args:
        scores: Scores of the calibration rows [N, ...]. Each further position has a separate quantile.
        alpha: Share of new rows that may exceed the threshold, in [0, 1].

    Returns:
        [...] in float64.

    Raises:
        InputError: ``alpha`` is not in [0, 1], or the scores are not floating point or hold NaN.

    Source: Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005; Lei et al., JASA 113 (2018), for the rank.

    Example:
        >>> scores = torch.arange(1.0, 20.0)
        >>> conformal_quantile(scores, 0.1), conformal_quantile(scores, 0.01)
        (tensor(18., dtype=torch.float64), tensor(inf, dtype=torch.float64))
    """
    scores = _checked(scores, 1, "[N, ...]")
    rank = math.ceil((len(scores) + 1) * (1 - exact_fraction(alpha)))
    if 1 <= rank <= len(scores):
        return scores.kthvalue(rank, 0).values
    return scores.new_full(scores.shape[1:], math.inf if rank else -math.inf)


def group_quantiles(scores: Tensor, groups: Tensor, num_groups: int, alpha: float) -> Tensor:
    """:func:`conformal_quantile` of each group's rows: [N, ...] -> [G, ...], so that the coverage holds within each group.

    With labels as groups, this is class-conditional (Mondrian) conformal prediction. The threshold of a group with too few rows is infinite.

    Args:
        scores: Scores of the calibration rows [N, ...].
        groups: The group of each row [N], in [0, num_groups). A new row's group must be known too, or be its candidate label.
        num_groups: Number of groups G.
        alpha: Share of each group's new rows that may exceed its threshold, in [0, 1].

    Returns:
        [G, ...] in float64; index it as ``thresholds[groups]`` for rows.

    Raises:
        InputError: A group is out of range, or see :func:`conformal_quantile`.

    Source: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.

    Example:
        >>> group_quantiles(torch.arange(6.0), torch.tensor([0, 1, 0, 1, 0, 0]), 3, 0.5)
        tensor([4., 3., inf], dtype=torch.float64)
    """
    check_integer("num_groups", num_groups, 1)
    scores = _checked(scores, 1, "[N, ...]")
    check_class_indices("groups", groups)
    check_shape("groups", groups, scores.shape[:1])
    check_target_values(groups, num_groups, "groups")
    counts = torch.bincount(groups.long(), minlength=num_groups).tolist()
    parts = torch.split(scores[groups.argsort()], counts)
    return torch.stack([conformal_quantile(part, alpha) for part in parts])


def weighted_conformal_quantile(scores: Tensor, weights: Tensor, new_weights: Tensor, alpha: float) -> Tensor:
    """Thresholds under a known covariate shift, one per new row: the (1 - alpha) quantile of sum_i p_i delta(s_i) + p_new delta(inf).

    A weight is the ratio of the new to the calibration density at an input, up to a common factor. p is a weight divided by the sum of
    the n calibration weights and the new row's weight. Equal weights give :func:`conformal_quantile`. Shares that differ by less than a
    relative 1e-12 count as equal.

    Args:
        scores: Scores of the calibration rows [N].
        weights: Their weights [N], not negative.
        new_weights: Weights of the new rows [B], not negative.
        alpha: Share of new rows that may exceed their threshold, in [0, 1].

    Returns:
        [B] in float64. Plus infinity if the new row's weight exceeds alpha times the sum; minus infinity if ``alpha`` is 1.

    Raises:
        InputError: A weight is negative or not finite, the shapes differ, or see :func:`conformal_quantile`.

    Source: Tibshirani et al., "Conformal prediction under covariate shift", NeurIPS 2019 (arXiv 1904.06019), lemma 3.

    Example:
        >>> scores, weights = torch.arange(1.0, 5.0), torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> weighted_conformal_quantile(scores, weights, torch.tensor([1.0, 9.0]), 0.4)
        tensor([2., inf], dtype=torch.float64)
    """
    scores = _checked(scores, 1, "[N]")
    check_shape("scores", scores, torch.Size([scores.numel()]))
    check_floating("weights", weights, 1, "[N]")
    check_shape("weights", weights, scores.shape)
    check_floating("new_weights", new_weights, 1, "[B]")
    check_shape("new_weights", new_weights, torch.Size([new_weights.numel()]))
    for name, value in (("weights", weights), ("new_weights", new_weights)):
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise InputError(f"`{name}` must be finite and non-negative, but it holds other values.")
    share = 1 - exact_fraction(alpha)
    if share == 0:
        return scores.new_full(new_weights.shape, -math.inf)
    ordered, order = scores.sort()
    below = widen(weights)[order].cumsum(0)
    total = below[-1:].sum() + widen(new_weights)
    index = torch.searchsorted(below, float(share) * total * (1 - 1e-12))
    # If all weights are 0, nothing is known about a new row.
    index = torch.where(total > 0, index, len(ordered))
    return torch.cat([ordered, ordered.new_tensor([math.inf])])[index]


def _checked(scores: Tensor, ndim: int, axes: str) -> Tensor:
    """Scores in float64 without NaN."""
    check_floating("scores", scores, ndim, axes)
    check_no_nan("scores", scores)
    return widen(scores.detach())
