"""Metrics of one method's test rows under many weightings at once, such as those of a bootstrap.

All functions take numbers per row [N] and non-negative weights [R, N], and return [R] in float64. A weight of k counts as k copies of the
row. With weights of one, each equals the unweighted metric of that name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration import uniform_bins
from lightning_uq.functional.ood import (
    Positive,
    auroc_of_counts,
    average_precision_of_counts,
    check_detection,
    fpr_of_counts,
)
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import (
    check_choice,
    check_floating,
    check_integer,
    check_open_unit,
    check_shape,
    check_tensor,
    describe,
)

_ELEMENTS = 2**17
"""Approximate number of weights that a metric processes at a time."""


def weighted_mean(value: Tensor, weights: Tensor) -> Tensor:
    """The mean of numbers [N] for each of the weightings [R, N].

    Raises:
        InputError: A shape differs, or ``value`` is complex.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
        tensor([1.5000, 1.2500], dtype=torch.float64)
    """
    weights = _checked("value", value, weights)
    return weights @ to_float64(value).to(weights.device) / weights.sum(1)


def weighted_rmse(squared_error: Tensor, weights: Tensor) -> Tensor:
    """The root of the mean of squared errors [N] for each of the weightings [R, N].

    Raises:
        InputError: A shape differs, or ``squared_error`` is complex.

    Example:
        >>> weighted_rmse(torch.tensor([0.0, 8.0]), torch.tensor([[1.0, 1.0], [7.0, 1.0]]))
        tensor([2., 1.], dtype=torch.float64)
    """
    _checked("squared_error", squared_error, weights)
    return weighted_mean(squared_error, weights).sqrt()


def weighted_ece(confidence: Tensor, correct: Tensor, weights: Tensor, num_bins: int = 15) -> Tensor:
    """The expected calibration error, sum_b |sum_{i in b} w_i (correct_i - confidence_i)| / sum_i w_i, with bins of equal width.

    Args:
        confidence: Probabilities of the predicted labels, [N].
        correct: Whether the labels are right, [N].
        weights: Weights [R, N].
        num_bins: Number of bins; see :func:`~lightning_uq.functional.calibration.bin_statistics` for their edges.

    Returns:
        The error [R], as from :func:`~lightning_uq.functional.expected_calibration_error` for rows of probabilities.

    Raises:
        InputError: A shape differs, ``confidence`` is not floating point or leaves [0, 1], or ``num_bins`` is not a positive integer.

    Example:
        >>> weighted_ece(torch.tensor([0.75, 0.75]), torch.tensor([True, False]), torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
        tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    check_integer("num_bins", num_bins, 1)
    check_floating("confidence", confidence, 1, "[N]")
    weights = _checked("confidence", confidence, weights)
    check_tensor("correct", correct, str(list(confidence.shape)))
    check_shape("correct", correct, confidence.shape)
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise InputError("`confidence` must hold probabilities in [0, 1], but it holds other numbers.")
    gap = weights.new_zeros(len(confidence), num_bins)
    bins = uniform_bins(confidence, num_bins).to(weights.device)
    gap.scatter_(1, bins[:, None], (to_float64(correct) - to_float64(confidence)).to(weights.device)[:, None])
    return (weights @ gap).abs().sum(1) / weights.sum(1)


def weighted_auroc(score: Tensor, is_ood: Tensor, weights: Tensor) -> Tensor:
    """The area under the ROC curve, [R]; rows with equal scores count half.

    Args:
        score: Scores [N]; higher is more out of distribution.
        is_ood: Labels [N].
        weights: Weights [R, N].

    Returns:
        See :func:`~lightning_uq.functional.auroc`; NaN if all rows of one kind have weight 0.

    Raises:
        InputError: A shape differs, or a score or label is invalid (see :func:`~lightning_uq.functional.ood.check_detection`).

    Example:
        >>> weights = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
        >>> weighted_auroc(torch.tensor([0.1, 0.4, 0.4]), torch.tensor([0, 0, 1]), weights)
        tensor([0.7500, 0.8750], dtype=torch.float64)
    """
    return _detection(auroc_of_counts, score, is_ood, weights, "out")


def weighted_average_precision(score: Tensor, is_ood: Tensor, weights: Tensor, positive: Positive = "out") -> Tensor:
    """The average precision, [R]; see :func:`~lightning_uq.functional.average_precision`.

    Args:
        score: Scores [N]; higher is more out of distribution.
        is_ood: Labels [N].
        weights: Weights [R, N].
        positive: The kind to detect, "out" or "in".

    Raises:
        InputError: See :func:`weighted_auroc`; or ``positive`` is unknown.

    Example:
        >>> weights = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
        >>> weighted_average_precision(torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0, 0, 1]), weights)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return _detection(average_precision_of_counts, score, is_ood, weights, positive)


def weighted_fpr_at_tpr(
    score: Tensor, is_ood: Tensor, weights: Tensor, tpr: float = 0.95, positive: Positive = "in"
) -> Tensor:
    """The false positive rate at a true positive rate of ``tpr``, [R]; see :func:`~lightning_uq.functional.fpr_at_tpr`.

    Args:
        score: Scores [N]; higher is more out of distribution.
        is_ood: Labels [N].
        weights: Weights [R, N].
        tpr: Required true positive rate, in (0, 1).
        positive: The kind to detect, "in" or "out".

    Raises:
        InputError: See :func:`weighted_auroc`; or ``tpr`` or ``positive`` is out of range.

    Example:
        >>> weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0]])
        >>> weighted_fpr_at_tpr(torch.tensor([0.1, 0.5, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]), weights)
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    check_open_unit("tpr", tpr)
    return _detection(lambda true, false: fpr_of_counts(true, false, tpr), score, is_ood, weights, positive)


def _detection(
    value: Callable[[Tensor, Tensor], Tensor], score: Tensor, is_ood: Tensor, weights: Tensor, positive: Positive
) -> Tensor:
    """Compute a function of the weighted counts at each distinct score, from the most positive one on; rows are sorted once."""
    check_choice("positive", positive, ("out", "in"))
    score, is_positive = check_detection(score, is_ood)
    weights = _checked("score", score, weights)
    if positive == "in":
        score, is_positive = -score, ~is_positive
    ordered, order = score.sort(descending=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    order, end = order.to(weights.device), last.nonzero().squeeze(1).to(weights.device)
    is_positive = is_positive.to(weights.device)[order]
    found = []
    for part in torch.split(weights, max(1, _ELEMENTS // max(1, len(score)))):
        rows = take_columns(part, order)
        true, false = (rows * is_positive).cumsum(1), (rows * ~is_positive).cumsum(1)
        if len(end) < len(order):
            true, false = take_columns(true, end), take_columns(false, end)
        found.append(value(true, false))
    return torch.cat(found)


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """``x[:, columns]``, but three times as fast on the CPU.

    Example:
        >>> take_columns(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 0, 1]))
        tensor([[2., 1., 2.]])
    """
    return x.gather(1, columns.expand(len(x), -1))


def _checked(name: str, rows: Tensor, weights: Tensor) -> Tensor:
    """Check the shapes, and return the weights in float64."""
    check_tensor(name, rows, "[N]")
    if rows.ndim != 1 or rows.is_complex():
        raise InputError(f"`{name}` must be a tensor of real numbers [N], but it is {describe(rows)}.")
    check_floating("weights", weights, 2, "[R, N]")
    if weights.ndim != 2 or weights.shape[1] != len(rows):
        raise InputError(
            f"`weights` must have shape [R, {len(rows)}], a weight for each row, but its shape is {list(weights.shape)}."
        )
    return to_float64(weights)
