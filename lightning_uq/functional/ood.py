"""Detection of out-of-distribution inputs by a score, exact and with ties.

All functions take a score [N] (higher is more out of distribution) and ``is_ood`` [N] (bool, or 0 and 1). A detector is a threshold on
the score, so rows with equal scores are always on the same side, which defines the treatment of ties. Counts are integers and so
exact. Each function returns a float64 scalar, or NaN if one of the two kinds is missing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64, widen
from lightning_uq.functional.validation import (
    check_choice,
    check_floating,
    check_no_nan,
    check_open_unit,
    check_shape,
    check_tensor,
    describe,
)

Positive = Literal["out", "in"]


def check_detection(score: Tensor, is_ood: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Check scores and labels, and return them as vectors, the labels as bool.

    Raises:
        InputError: A score is not floating point or NaN, the shapes differ or are not [N], or a label is neither 0 nor 1.
    """
    check_floating("score", score, 1, "[N]")
    if score.ndim != 1:
        raise InputError(f"`score` must be a floating-point tensor [N], but it is {describe(score)}.")
    check_tensor("is_ood", is_ood, str(list(score.shape)))
    check_shape("is_ood", is_ood, score.shape)
    if is_ood.is_floating_point():
        raise InputError(f"`is_ood` must be of dtype bool or an integer dtype, but its dtype is {is_ood.dtype}.")
    if validate:
        check_no_nan("score", score)
        if is_ood.dtype != torch.bool and bool(((is_ood != 0) & (is_ood != 1)).any()):
            raise InputError("`is_ood` must hold only 0 and 1, but it holds other values.")
    return score, is_ood.bool()


def detection_counts(score: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative counts, from the highest score down, at each distinct score.

    Args:
        score: Scores [N].
        is_positive: Labels [N] of bool.

    Returns:
        Two int64 tensors [T], one entry per distinct score: the numbers of true and false positives among the rows with at
        least that score.

    Example:
        >>> detection_counts(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([True, True, False]))
        (tensor([1, 2]), tensor([0, 1]))
    """
    ordered, order = score.sort(descending=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    end = last.nonzero().squeeze(1)
    true = is_positive[order].long().cumsum(0)[end]
    return true, end + 1 - true


def auroc(score: Tensor, is_ood: Tensor) -> Tensor:
    """Area under the ROC curve: P(score_out > score_in) + 1/2 P(score_out = score_in).

    Args:
        score: Scores [N].
        is_ood: Labels [N].

    Returns:
        A scalar in [0, 1]; 0.5 is chance.

    Raises:
        InputError: See :func:`check_detection`.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.8750, dtype=torch.float64)
    """
    score, is_ood = check_detection(score, is_ood)
    return auroc_of_counts(*detection_counts(score, is_ood))


def auroc_of_counts(true: Tensor, false: Tensor) -> Tensor:
    """The area under the ROC curve, [...], from cumulative counts [..., T] of :func:`detection_counts`."""
    true, false = (widen(count) for count in _with_origin(true, false))
    return torch.trapezoid(true, false) / (true[..., -1] * false[..., -1])


def _with_origin(true: Tensor, false: Tensor) -> tuple[Tensor, Tensor]:
    return pad(true, (1, 0)), pad(false, (1, 0))


def roc_curve(score: Tensor, is_ood: Tensor) -> tuple[Tensor, Tensor]:
    """The ROC curve's false and true positive rates, from (0, 0) to (1, 1), one point per distinct score."""
    true, false = (widen(c) for c in _with_origin(*detection_counts(*check_detection(score, is_ood))))
    return false / false[-1], true / true[-1]


def average_precision(score: Tensor, is_ood: Tensor, positive: Positive = "out") -> Tensor:
    """Average precision, sum_t (R_t - R_{t-1}) P_t over the distinct thresholds: the step-wise area, without interpolation.

    Args:
        score: Scores [N].
        is_ood: Labels [N].
        positive: The kind to detect. "out" ranks by the score; "in" measures how well in-distribution rows are found by a low
            score. The two values are not comparable: their chance level is the share of the positive kind.

    Returns:
        A scalar in [0, 1].

    Raises:
        InputError: See :func:`check_detection`; or ``positive`` is unknown.

    Example:
        >>> average_precision(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.8333, dtype=torch.float64)
    """
    return average_precision_of_counts(*_precision_counts(score, is_ood, positive))


def average_precision_of_counts(true: Tensor, false: Tensor) -> Tensor:
    """The average precision, [...], from cumulative counts [..., T] of :func:`detection_counts`."""
    true, false = (widen(count) for count in _with_origin(true, false))
    both = true + false
    precision = true[..., 1:] / torch.where(both > 0, both, 1)[..., 1:]  # the first rows may have weight 0
    value: Tensor = (true.diff() * precision).sum(-1) / true[..., -1]
    return torch.where(false[..., -1] > 0, value, torch.nan)


def precision_recall_curve(score: Tensor, is_ood: Tensor, positive: Positive = "out") -> tuple[Tensor, Tensor]:
    """Recall and precision at each distinct score, from the most to the least positive."""
    true, false = (widen(count) for count in _precision_counts(score, is_ood, positive))
    return true / true[-1:], true / (true + false)


def _precision_counts(score: Tensor, is_ood: Tensor, positive: Positive) -> tuple[Tensor, Tensor]:
    check_choice("positive", positive, ("out", "in"))
    score, is_ood = check_detection(score, is_ood)
    return detection_counts(score, is_ood) if positive == "out" else detection_counts(-score, ~is_ood)


def fpr_at_tpr(score: Tensor, is_ood: Tensor, tpr: float = 0.95, positive: Positive = "in") -> Tensor:
    """False positive rate of the strictest threshold with a true positive rate of at least ``tpr``.

    Two different metrics are called FPR95:

    - ``positive="in"``: a row is accepted as in-distribution if score <= t. t is the smallest threshold that accepts at least
      ``tpr`` of the in-distribution rows. The result is the share of out-of-distribution rows that it accepts.
    - ``positive="out"``: a row is flagged if score >= t. t is the largest threshold that flags at least ``tpr`` of the
      out-of-distribution rows. The result is the share of in-distribution rows that it flags.

    Rows tied at t are accepted (flagged) together. :class:`~lightning_uq.metrics.OODFPR95` lists who reports which metric.

    Args:
        score: Scores [N].
        is_ood: Labels [N].
        tpr: Required true positive rate, in (0, 1).
        positive: The kind to detect, "in" or "out".

    Returns:
        A scalar in [0, 1]; lower is better.

    Raises:
        InputError: See :func:`check_detection`; or ``tpr`` or ``positive`` is out of range.

    Example:
        >>> score = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.25])
        >>> fpr_at_tpr(score, torch.tensor([0, 0, 0, 0, 1, 1]), tpr=0.75)
        tensor(0.5000, dtype=torch.float64)
    """
    check_open_unit("tpr", tpr)
    check_choice("positive", positive, ("out", "in"))
    score, is_ood = check_detection(score, is_ood)
    return fpr_of_counts(
        *(detection_counts(score, is_ood) if positive == "out" else detection_counts(-score, ~is_ood)), tpr
    )


def fpr_of_counts(true: Tensor, false: Tensor, tpr: float) -> Tensor:
    """The false positive rate, [...], from cumulative counts [..., T] of :func:`detection_counts`."""
    true, false = _with_origin(true, false)
    # Shares are compared in float64, so that 19 of 20 is exactly 95 %; tpr * total could be rounded up or down.
    found = to_float64(true) / to_float64(true[..., -1:])
    threshold = (found < tpr).sum(-1, keepdim=True).to(false.device)  # 0 if there is no positive row
    rate = widen(false.gather(-1, threshold)[..., 0]) / false[..., -1]
    return torch.where(true[..., -1] > 0, rate, torch.nan)
