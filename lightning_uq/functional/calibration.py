"""Binned calibration errors: with uniform or adaptive bins, debiased, class-wise.

A binned error is computed in two steps, so that a data set can be streamed: :func:`bin_statistics` sums a batch into bins, these
sums are added over batches, and :func:`calibration_error` takes the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast, wide_dtype, widen
from lightning_uq.functional.validation import check_choice, check_integer, classification_rows
from lightning_uq.functional.waiting import is_free

Norm = Literal["l1", "l2", "max"]
Binning = Literal["uniform", "adaptive"]

# So many numbers are summed at a time. On a CPU, their float64 copies stay in its cache.
_CHUNK, _CHUNK_CPU = 1 << 20, 1 << 15


def top_label(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of the most probable class (the first one if tied).

    Args:
        probs: Probabilities [N, C].
        target: Class indices [N].

    Returns:
        The confidence [N], in the dtype of ``probs``, and whether the class equals the target, bool [N].

    Example:
        >>> top_label(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([1, 1]))
        (tensor([0.7500, 0.5000]), tensor([ True, False]))
    """
    confidence, label = probs.max(1)
    return confidence, label == target


def bin_statistics(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Sum confidences into the equal-width bins ((k - 1) / num_bins, k / num_bins].

    A confidence of 0 is in the first bin, and a confidence of 1 in the last. An edge is k / num_bins rounded to the dtype of
    ``confidence``, so a confidence written as k / num_bins lies on the edge, and hence in the bin below it, in every precision.

    Args:
        confidence: Probabilities [N], or [N, C] for one set of bins per class.
        correct: Whether each prediction was correct, in the same shape.
        num_bins: Number of bins.

    Returns:
        [3, num_bins] or [3, C, num_bins] in float64: the number of rows, the number of correct rows, and the sum of the
        confidences.

    Example:
        >>> bin_statistics(torch.tensor([0.5, 1.0]), torch.tensor([True, False]), 2)
        tensor([[1.0000, 1.0000],
                [1.0000, 0.0000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    return _sum_bins(confidence, correct, lambda part: uniform_bins(part, num_bins), num_bins)


def uniform_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """The bin number of each confidence, starting at 0; see :func:`bin_statistics`.

    Example:
        >>> uniform_bins(torch.tensor([0.0, 0.5, 0.51, 1.0]), 2)
        tensor([0, 0, 1, 1])
    """
    if confidence.dtype == torch.float32 and is_free(confidence) and wide_dtype(confidence.device) == torch.float64:
        # The search in `bucketize` mispredicts most branches and takes a CPU twice to ten times as long. A float32 exceeds
        # round(k / num_bins) exactly if the midpoint between it and the next lower float32, 2^28 steps of float64 below it, exceeds
        # k / num_bins.
        position = confidence.double()
        position.view(torch.int64).clamp_(1 << 28).sub_(1 << 28)
        return position.mul_(num_bins).long().clamp_(0, num_bins - 1)
    # `linspace` would accumulate rounding; k / num_bins in float64 is correctly rounded.
    edges = (widen(torch.arange(1, num_bins, device=confidence.device)) / num_bins).to(confidence.dtype)
    return torch.bucketize(upcast(confidence).contiguous(), upcast(edges))


def adaptive_bin_statistics(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Sum confidences into bins of equal mass, (q_{k-1}, q_k], where q_k is the ceil(k N / num_bins)-th smallest of them.

    Equal confidences always share a bin, so the result depends neither on the order of the rows nor on how sorting breaks ties.
    If many are tied, bins are uneven, and some are empty.

    Args:
        confidence: All probabilities [N] of the data set, or [N, C] for one set of bins per class.
        correct: Whether each prediction was correct, in the same shape.
        num_bins: Number of bins.

    Returns:
        Sums as from :func:`bin_statistics`.

    Source: Nixon et al., CVPR workshops 2019 (arXiv 1904.01685).

    Example:
        >>> adaptive_bin_statistics(torch.tensor([0.9, 0.6, 0.7, 0.8]), torch.tensor([1, 0, 0, 1]), 2)[0]
        tensor([2., 2.], dtype=torch.float64)
    """
    columns = (confidence[None] if confidence.ndim == 1 else confidence.T).contiguous()  # [1 or C, N]
    if columns.shape[1] == 0:
        return widen(confidence.new_zeros(3, *confidence.shape[1:], num_bins))
    cuts = -(-torch.arange(1, num_bins, device=columns.device) * columns.shape[1] // num_bins) - 1
    edges = columns.sort(1).values[:, cuts]

    def find(part: Tensor) -> Tensor:
        return torch.searchsorted(edges, part.reshape(len(part), -1).T.contiguous()).T.reshape(part.shape)

    return _sum_bins(confidence, correct, find, num_bins)


def _sum_bins(confidence: Tensor, correct: Tensor, find: Callable[[Tensor], Tensor], num_bins: int) -> Tensor:
    """The sums of :func:`bin_statistics`, with the bins that ``find`` returns for confidences."""
    rows = max(1, (_CHUNK_CPU if is_free(confidence) else _CHUNK) // max(1, math.prod(confidence.shape[1:])))
    if len(confidence) > rows and not torch.compiler.is_compiling():
        chunks = zip(torch.split(confidence, rows), torch.split(correct, rows), strict=True)
        total = _sum_bins(*next(chunks), find, num_bins)
        for chunk in chunks:
            total = total + _sum_bins(*chunk, find, num_bins)
        return total
    bins = find(confidence)
    if confidence.ndim == 1:
        return _sum_cells(confidence, correct, bins, num_bins)
    classes = confidence.shape[1]
    cells = bins + num_bins * torch.arange(classes, device=bins.device)
    sums = _sum_cells(confidence.reshape(-1), correct.reshape(-1), cells.reshape(-1), num_bins * classes)
    return sums.reshape(3, classes, num_bins)


def _sum_cells(confidence: Tensor, correct: Tensor, cells: Tensor, size: int) -> Tensor:
    """Number of rows, number of correct rows and sum of confidences of each cell, [3, size]. The counts are integers and so exact."""
    confidence = widen(confidence)
    return scatter_sum(cells, torch.stack([torch.ones_like(confidence), widen(correct), confidence]), size)


def scatter_sum(cells: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum ``values`` [..., N] by cell, [..., size], in the dtype of sums."""
    # Not `bincount`: it waits for the device, and with weights it raises on CUDA under Trainer(deterministic=True).
    values = widen(values)
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, cells, values)


def calibration_error(statistics: Tensor, norm: Norm = "l1", debiased: bool = False) -> Tensor:
    """Calibration error of summed bins.

    With n_b rows, accuracy a_b and mean confidence c_b in bin b, N = sum n_b:

    - ``l1``: sum_b n_b / N |a_b - c_b|
    - ``l2``: sqrt(sum_b n_b / N (a_b - c_b)^2)
    - ``max``: max_b |a_b - c_b| over the bins that are not empty
    - ``l2``, debiased: sqrt(max(0, sum_b n_b / N [(a_b - c_b)^2 - a_b (1 - a_b) / (n_b - 1)])). A bin with one row, whose
      variance is unknown, contributes 0.

    Class-wise statistics [3, C, num_bins] are treated as one set of C x num_bins cells: ``l1`` is then the mean over classes
    of the class-wise error (Kull et al.), and ``l2`` the marginal calibration error (Kumar et al.).

    Args:
        statistics: The result of :func:`bin_statistics`, or a sum of such results.
        norm: "l1", "l2" or "max".
        debiased: Whether to subtract the sampling variance from each squared gap; only for ``l2``.

    Returns:
        A scalar in [0, 1]; NaN without rows.

    Raises:
        InputError: ``debiased`` is combined with a norm other than ``l2``, or the norm is unknown.

    Source: Naeini et al., AAAI 2015; Kumar et al., NeurIPS 2019 (arXiv 1909.10155); Kull et al., NeurIPS 2019
    (arXiv 1910.12656).

    Example:
        >>> statistics = bin_statistics(torch.tensor([0.75, 0.75]), torch.tensor([True, False]), 4)
        >>> calibration_error(statistics), calibration_error(statistics, "l2", debiased=True)
        (tensor(0.2500, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    check_norm(norm, debiased)
    count, correct, confidence = statistics.flatten(1)
    total = count.sum()
    filled = count.clamp_min(1)
    accuracy = correct / filled
    gap = (correct - confidence).abs() / filled
    weight = count / total  # NaN without rows, which makes the result NaN
    if norm == "max":
        return torch.where(total > 0, gap.amax(), torch.nan)
    if norm == "l1":
        return torch.sum(weight * gap)
    squared = gap.square()
    if debiased:
        variance = accuracy * (1 - accuracy) / (count - 1).clamp_min(1)
        squared = torch.where(count > 1, squared - variance, 0.0)
    return torch.sum(weight * squared).clamp_min(0).sqrt()


def check_norm(norm: str, debiased: bool) -> None:
    """Refuse an unknown norm, and a debiased estimate for norms other than l2."""
    check_choice("norm", norm, ("l1", "l2", "max"))
    if debiased and norm != "l2":
        raise InputError(f"`debiased` must be False with norm={norm!r}: the debiased estimator exists only for 'l2'.")


def expected_calibration_error(
    probs: Tensor,
    target: Tensor,
    num_bins: int = 15,
    norm: Norm = "l1",
    binning: Binning = "uniform",
    debiased: bool = False,
    classwise: bool = False,
) -> Tensor:
    """Expected calibration error of a data set that fits in memory; see :func:`calibration_error` for the formulas.

    Args:
        probs: Probabilities [B, C], or [B, C, ...] with each position as a row.
        target: Class indices [B] (or [B, ...]).
        num_bins: Number of bins.
        norm: "l1" (the usual ECE), "l2" or "max" (the maximum calibration error).
        binning: "uniform" for equal width, "adaptive" for equal mass.
        debiased: Whether to use Kumar et al.'s debiased estimate; only for ``l2``.
        classwise: Whether to use each class's probability instead of the top label's.

    Returns:
        A scalar in [0, 1]; a fraction, not a percentage.

    Raises:
        InputError: ``probs`` are not probabilities, shapes differ, or a target is out of range.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> expected_calibration_error(probs, torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    check_integer("num_bins", num_bins, 1)
    check_choice("binning", binning, ("uniform", "adaptive"))
    check_norm(norm, debiased)
    confidence, correct = calibration_pairs(*classification_rows(probs, target), classwise)
    statistics = bin_statistics if binning == "uniform" else adaptive_bin_statistics
    return calibration_error(statistics(confidence, correct, num_bins), norm, debiased)


def calibration_pairs(probs: Tensor, target: Tensor, classwise: bool) -> tuple[Tensor, Tensor]:
    """Pairs (probability, correctness) of rows [N, C]: of the top label [N], or of every class [N, C]."""
    if not classwise:
        return top_label(probs, target)
    return probs, target[:, None] == torch.arange(probs.shape[1], device=probs.device)
