"""Bins of several labels' probabilities, for a calibration error per label."""

import torch
from torch import Tensor

from lightning_uq.functional.calibration import scatter_sum, uniform_bins
from lightning_uq.functional.precision import widen


def label_bin_statistics(probs: Tensor, target: Tensor, num_bins: int) -> Tensor:
    """Sum each label's probabilities into the equal-width bins ((k - 1) / num_bins, k / num_bins], the first one closed.

    Args:
        probs: Probability [N, L] that each label is 1.
        target: The labels [N, L]: 0, 1 or a probability; NaN marks unknown labels.
        num_bins: Number of bins.

    Returns:
        [3, L, num_bins] in float64, as input of :func:`~lightning_uq.functional.calibration_error`: number of known labels, sum of
        their targets, and sum of their probabilities.

    Example:
        >>> label_bin_statistics(torch.tensor([[0.75], [0.5]]), torch.tensor([[1.0], [float("nan")]]), 2)
        tensor([[[0.0000, 1.0000]],
        <BLANKLINE>
                [[0.0000, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.7500]]], dtype=torch.float64)
    """
    num_labels = probs.shape[1]
    size = num_labels * num_bins
    known = ~target.isnan()
    cells = uniform_bins(probs, num_bins) + num_bins * torch.arange(num_labels, device=probs.device)
    cells = torch.where(known, cells, size).reshape(-1)  # unknown labels go to an extra cell, which is dropped
    values = (torch.ones_like(target), torch.where(known, target, 0.0), probs)
    sums = [scatter_sum(cells, widen(value).reshape(-1), size + 1)[:size] for value in values]
    return torch.stack(sums).reshape(3, num_labels, num_bins)
