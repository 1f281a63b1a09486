"""Detection metrics from histograms of scores, for more scores than fit in memory, such as all pixels of a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.functional.ood import Positive, auroc_of_counts, average_precision_of_counts, fpr_of_counts
from lightning_uq.functional.validation import check_floating, check_no_nan

_BITS = 20
NUM_BINS = 2**_BITS
"""Number of bins: 2,048 per power of two and sign. A histogram takes 8 MB, and two scores in a bin differ by 0.05 %."""


def score_histogram(score: Tensor) -> Tensor:
    """Number of scores in each of 2^20 bins, in ascending order, which cover all float32 numbers.

    A bin is identified by the first 20 bits of a float32: its sign, its exponent and 11 bits of its mantissa. The bins therefore need
    no range of scores, and histograms of several batches can be added.

    Args:
        score: Scores of any shape; infinities are allowed.

    Returns:
        Counts [2^20], in int64.

    Raises:
        InputError: A score is NaN, or the dtype is not floating point.

    Example:
        >>> histogram = score_histogram(torch.tensor([-1.0, 0.5, 0.5, 2.0]))
        >>> histogram[histogram > 0]
        tensor([1, 2, 1])
    """
    check_floating("score", score, 0, "[...]")
    check_no_nan("score", score)
    # Adding 0 makes -0 equal to 0.
    bits = (score.reshape(-1).float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    found = ordered >> (32 - _BITS)
    return torch.zeros(NUM_BINS, dtype=torch.long, device=score.device).index_add(0, found, torch.ones_like(found))


def histogram_counts(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative numbers of true and false positives, from the highest bin down, at each non-empty bin.

    Args:
        positive: Histogram of the scores of the positive kind.
        negative: Histogram of the scores of the other kind.

    Example:
        >>> histogram_counts(torch.tensor([1, 0, 2]), torch.tensor([3, 0, 0]))
        (tensor([2, 3]), tensor([0, 3]))
    """
    held = (positive + negative).flip(0).nonzero().squeeze(1)
    return positive.flip(0)[held].cumsum(0), negative.flip(0)[held].cumsum(0)


def histogram_auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """:func:`~lightning_uq.functional.auroc` from two histograms of scores; scores in one bin are tied.

    Args:
        inside: Histogram of the in-distribution scores.
        outside: Histogram of the out-of-distribution scores.

    Example:
        >>> low, high = (score_histogram(torch.tensor(scores)) for scores in ([0.1, 0.2], [0.2, 0.3]))
        >>> histogram_auroc(low, high)
        tensor(0.8750, dtype=torch.float64)
    """
    return auroc_of_counts(*histogram_counts(outside, inside))


def histogram_average_precision(inside: Tensor, outside: Tensor, positive: Positive = "out") -> Tensor:
    """:func:`~lightning_uq.functional.average_precision` from two histograms of scores.

    Args:
        inside: Histogram of the in-distribution scores.
        outside: Histogram of the out-of-distribution scores.
        positive: The kind to detect: "out" by a high score, "in" by a low score.

    Example:
        >>> low, high = (score_histogram(torch.tensor(scores)) for scores in ([0.1, 0.2], [0.2, 0.3]))
        >>> histogram_average_precision(low, high)
        tensor(0.8333, dtype=torch.float64)
    """
    return average_precision_of_counts(*_counts(inside, outside, positive))


def histogram_fpr95(inside: Tensor, outside: Tensor, positive: Positive = "in") -> Tensor:
    """:func:`~lightning_uq.functional.fpr_at_tpr` at 95 %, from two histograms of scores.

    Args:
        inside: Histogram of the in-distribution scores.
        outside: Histogram of the out-of-distribution scores.
        positive: The kind to detect: "out" by a high score, "in" by a low score.

    Example:
        >>> low, high = (score_histogram(torch.tensor(scores)) for scores in ([0.1, 0.2], [0.2, 0.3]))
        >>> histogram_fpr95(low, high)
        tensor(0.5000, dtype=torch.float64)
    """
    return fpr_of_counts(*_counts(inside, outside, positive), tpr=0.95)


def _counts(inside: Tensor, outside: Tensor, positive: Positive) -> tuple[Tensor, Tensor]:
    """Cumulative counts, starting at the most positive score."""
    if positive == "out":
        return histogram_counts(outside, inside)
    return histogram_counts(inside.flip(0), outside.flip(0))
