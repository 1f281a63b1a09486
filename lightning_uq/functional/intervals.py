"""Scores of prediction intervals."""

from __future__ import annotations

from torch import Tensor

from lightning_uq.functional.precision import upcast_together
from lightning_uq.functional.validation import check_open_unit


def interval_score(lower: Tensor, upper: Tensor, target: Tensor, level: float) -> Tensor:
    """Interval score (Winkler score) of central intervals, elementwise, in the target's units; lower is better.

    With alpha = 1 - level: (upper - lower) + 2 / alpha (lower - y)_+ + 2 / alpha (y - upper)_+. Its expectation is smallest for
    the quantiles of y at alpha / 2 and 1 - alpha / 2.

    Args:
        lower: Lower bounds.
        upper: Upper bounds.
        target: Targets y.
        level: Nominal coverage of the interval, in (0, 1).

    Raises:
        InputError: ``level`` is not in (0, 1).

    Source: Winkler, JASA 67 (1972); Gneiting & Raftery, JASA 102 (2007), equation 43.

    Example:
        >>> import torch
        >>> interval_score(torch.zeros(2), torch.ones(2), torch.tensor([0.5, 1.5]), 0.9)
        tensor([ 1., 11.])
    """
    check_open_unit("level", level)
    lower, upper, target = upcast_together(lower, upper, target)
    outside = (lower - target).clamp_min(0) + (target - upper).clamp_min(0)
    return upper - lower + 2 / (1 - level) * outside
