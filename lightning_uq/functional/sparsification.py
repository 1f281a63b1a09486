"""Sparsification: the error of the remaining rows when the most uncertain rows are removed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_no_nan


def sparsification_curve(uncertainty: Tensor, error: Tensor, root: bool = False) -> Tensor:
    """Mean error of the remaining rows after the k most uncertain rows were removed, k = 0 ... N - 1.

    Rows of equal uncertainty have no order: if a tie is split, the mean over its random orders is used.

    Args:
        uncertainty: Uncertainties [N]; higher is removed first.
        error: Errors [N], absolute, or squared with ``root``.
        root: Whether to take the square root of each mean, as in an RMSE.

    Returns:
        [N] in float64.

    Raises:
        InputError: The shapes differ, or an uncertainty is NaN.

    Example:
        >>> sparsification_curve(torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0]))
        tensor([3., 2.], dtype=torch.float64)
    """
    if uncertainty.ndim != 1 or uncertainty.shape != error.shape:
        raise InputError(
            f"`uncertainty` and `error` must have one shape [N], but their shapes are {list(uncertainty.shape)} and "
            f"{list(error.shape)}."
        )
    check_no_nan("uncertainty", uncertainty)
    if not len(uncertainty):
        return widen(uncertainty)
    ordered, order = uncertainty.sort()
    errors = torch.cat([widen(error.new_zeros(1)), widen(error)[order].cumsum(0)])
    _, size = torch.unique_consecutive(ordered, return_counts=True)
    end = size.cumsum(0)
    tie = torch.repeat_interleave(torch.arange(len(size), device=size.device), size)
    start = (end - size)[tie]
    kept = torch.arange(1, len(order) + 1, device=order.device)
    within = (errors[end[tie]] - errors[start]) * widen(kept - start) / widen(size[tie])
    mean = ((errors[start] + within) / widen(kept)).flip(0)
    return mean.sqrt() if root else mean


def ause(uncertainty: Tensor, error: Tensor, root: bool = False) -> Tensor:
    """Area between the sparsification curve by uncertainty and the best possible curve, by the error itself.

    Both curves are divided by the error of all rows, and the area is the mean over the removed shares k / N, k = 0 ... N - 1.

    Args:
        uncertainty: Uncertainties [N]; higher is removed first.
        error: Errors [N], absolute, or squared with ``root``.
        root: Whether to average errors as in an RMSE.

    Returns:
        A scalar of at least 0, lower is better. It is 0 if the uncertainties rank like the errors, or if no row has an error, and NaN
        without rows.

    Source: Ilg et al., ECCV 2018 (arXiv 1802.07095).

    Example:
        >>> ause(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 2.0]))
        tensor(0.3333, dtype=torch.float64)
    """
    found, best = sparsification_curve(uncertainty, error, root), sparsification_curve(error, error, root)
    area = (found - best).mean()
    if not len(found):
        return area
    return torch.where(best[0] > 0, area / torch.where(best[0] > 0, best[0], 1.0), 0.0)
