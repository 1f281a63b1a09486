"""The probability integral transform (PIT), which is uniform on [0, 1] for calibrated predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen


def pit_counts(integral: Tensor, num_bins: int, known: Tensor | None = None) -> Tensor:
    """Number of probability integrals P(Y <= y) in each of equal bins of [0, 1].

    Args:
        integral: Probability integrals of the targets, of any shape.
        num_bins: Number of bins.
        known: A mask of the values that count; None for all.

    Returns:
        [num_bins] in float64.

    Example:
        >>> pit_counts(torch.tensor([0.1, 0.6, 1.0]), 2)
        tensor([1., 2.], dtype=torch.float64)
    """
    counted = torch.ones_like(integral, dtype=torch.bool) if known is None else known
    bins = (torch.where(counted, integral, 0.0) * num_bins).long().clamp(0, num_bins - 1).reshape(-1)
    return torch.zeros(num_bins, dtype=widen(integral).dtype, device=integral.device).scatter_add(
        0, bins, widen(counted.reshape(-1))
    )


def pit_distance(counts: Tensor) -> Tensor:
    """Distance between a PIT histogram and the uniform one: half the sum over bins of |share - 1 / bins|.

    Returns:
        A scalar in [0, 1), the total variation distance; NaN without targets.

    Source: Gneiting et al., JRSS B 69 (2007), for the histogram.

    Example:
        >>> pit_distance(torch.tensor([1.0, 3.0]))
        tensor(0.2500)
    """
    return 0.5 * (counts / counts.sum() - 1 / len(counts)).abs().sum()
