"""Predicted quantiles: their order, the quantile at another level, and the loss that they minimise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast_together


def check_levels(levels: object) -> tuple[float, ...]:
    """Check levels of quantiles and return them as a tuple: numbers in (0, 1) in increasing order.

    Raises:
        InputError: The levels are invalid.

    Example:
        >>> check_levels([0.1, 0.5])
        (0.1, 0.5)
    """
    values = levels.tolist() if isinstance(levels, Tensor) else levels
    try:
        found = tuple(float(value) for value in values)  # type: ignore[attr-defined]  # other types raise a TypeError
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 < level < 1 for level in found) or list(found) != sorted(set(found)):
        raise InputError(f"`levels` must be numbers in (0, 1) in increasing order, but they are {levels!r}.")
    return found


def pinball(quantile: Tensor, target: Tensor, level: float | Tensor) -> Tensor:
    """Pinball loss max(level (y - q), (level - 1) (y - q)), elementwise, in the target's units; lower is better.

    Its expectation is smallest if q is the quantile of y at this level.

    Args:
        quantile: Predicted quantiles.
        target: Targets y that broadcast to ``quantile``.
        level: The level in (0, 1), a number or a tensor that broadcasts.

    Source: Koenker & Bassett, Econometrica 46 (1978).

    Example:
        >>> pinball(torch.zeros(2), torch.tensor([1.0, -1.0]), 0.9)
        tensor([0.9000, 0.1000])
    """
    quantile, target = upcast_together(quantile, target)
    error = target - quantile
    return torch.maximum(level * error, (level - 1) * error)


def quantile_at(quantiles: Tensor, levels: Sequence[float], level: float) -> Tensor:
    """The quantile [...] at a level, from quantiles [..., Q] at increasing levels; interpolated linearly in the level.

    Args:
        quantiles: Quantiles [..., Q] in increasing order.
        levels: Their levels, Q numbers.
        level: The requested level.

    Raises:
        InputError: The level lies outside the predicted levels.

    Example:
        >>> quantile_at(torch.tensor([0.0, 1.0, 4.0]), (0.1, 0.5, 0.9), 0.7)
        tensor(2.5000)
    """
    tolerance = 1e-6  # levels such as (1 - 0.8) / 2 are rounded, and levels in a tensor are float32
    for i, known in enumerate(levels):
        if abs(known - level) < tolerance:
            return quantiles[..., i]
    if not levels[0] < level < levels[-1]:
        raise InputError(
            f"The quantile at level {level:.6g} lies outside the predicted levels, {levels[0]:.6g} to {levels[-1]:.6g}, so it "
            "is unknown. Predict more `levels`."
        )
    above = next(i for i, known in enumerate(levels) if known > level)
    low, high = levels[above - 1], levels[above]
    return torch.lerp(quantiles[..., above - 1], quantiles[..., above], (level - low) / (high - low))
