"""Scores of unusable rows: plus infinity, which raises every alarm."""

import math

import torch
from torch import Tensor


def infinite_where_bad(scores: Tensor, features: Tensor, bad: float = math.inf) -> Tensor:
    """Replace scores [N, ...] by ``bad`` if they are NaN, or if the features [N, D] hold NaN or infinity.

    Example:
        >>> infinite_where_bad(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([[0.0], [math.inf], [1.0]]))
        tensor([1., inf, inf])
    """
    rows = ~features.isfinite().all(1)
    return torch.where(rows.reshape(-1, *[1] * (scores.ndim - 1)) | scores.isnan(), bad, scores)
