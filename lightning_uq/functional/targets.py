"""Regression targets: their shape relative to the prediction's, and their missing values."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.functional.validation import check_shape


def aligned_target(target: Tensor, shape: torch.Size) -> Tensor:
    """A target in a prediction's shape [B, ..., D]; if D = 1, the target may lack that last axis.

    Raises:
        InputError: The target has another shape, which would broadcast.

    Example:
        >>> aligned_target(torch.zeros(5), torch.Size([5, 1])).shape
        torch.Size([5, 1])
    """
    if shape[-1:] == (1,) and target.shape == shape[:-1]:
        return target.unsqueeze(-1)
    check_shape("target", target, shape, advice="An array of another shape would broadcast.")
    return target


def known_targets(target: Tensor, missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The target with a number in place of each NaN, and a mask of the known values.

    Args:
        target: Targets of any shape; NaN marks missing targets.
        missing: The number that replaces NaN.

    Example:
        >>> known_targets(torch.tensor([1.0, float("nan")]))
        (tensor([1., 0.]), tensor([ True, False]))
    """
    known = ~target.isnan()
    return torch.where(known, target, missing), known


def sum_over_targets(log_prob: Tensor, known: Tensor) -> Tensor:
    """Joint log-density [Z, B] of the known targets from log-densities [Z, B, ...]; NaN for a row without known targets.

    Example:
        >>> sum_over_targets(torch.ones(1, 2, 2), torch.tensor([[True, False], [False, False]]))
        tensor([[1., nan]])
    """
    joint = torch.where(known, log_prob, 0.0).flatten(2).sum(2)
    return torch.where(known.flatten(1).any(1), joint, torch.nan)
