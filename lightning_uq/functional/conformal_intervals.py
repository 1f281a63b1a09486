"""Intervals of conformal prediction: one score and one interval for residuals, normalized residuals and quantiles.

| method | lower | upper | scale |
|---|---|---|---|
| absolute residuals | mean | mean | none |
| normalized residuals | mean | mean | standard deviation |
| conformalized quantile regression (CQR) | lower quantile | upper quantile | none |

For outputs [N, H, D] over a horizon of H steps, the scores [N, H, D] give one threshold per step and dimension [H, D], each with coverage
1 - alpha. Their maximum over the steps, ``scores.amax(1)``, gives thresholds [D] for bands that cover all steps jointly with that probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.targets import aligned_target
from lightning_uq.functional.validation import all_hold, check_floating, check_no_nan, check_shape


def interval_excess(lower: Tensor, upper: Tensor, target: Tensor, scale: Tensor | None = None) -> Tensor:
    """Distance of the target outside an interval, max(lower - y, y - upper) / scale; negative inside.

    Args:
        lower: Lower bounds [B, ...].
        upper: Upper bounds of the same shape. The mean as both bounds gives |y - mean|.
        target: Targets y of the same shape; the last axis may be missing if its size is 1.
        scale: Positive standard deviations of the same shape; None for 1.

    Returns:
        [B, ...] in float64.

    Raises:
        InputError: Shapes differ, a number is not finite, or a scale is not positive. Remove missing targets (NaN) beforehand.

    Source: Lei et al., JASA 113 (2018) (arXiv 1604.04173), section 5.2 for the scale; Romano, Patterson & Candes, "Conformalized quantile
    regression", NeurIPS 2019 (arXiv 1905.03222), equation 6.

    Example:
        >>> mean, target = torch.zeros(2, 1), torch.tensor([-3.0, 1.0])
        >>> interval_excess(mean, mean, target, scale=torch.full((2, 1), 2.0)).T
        tensor([[1.5000, 0.5000]], dtype=torch.float64)
    """
    lower, upper, scale = _checked(lower, upper, scale)
    check_floating("target", target, 1, "[B, ...]")
    target = aligned_target(target, lower.shape)
    if not all_hold(target.isfinite()):
        raise InputError(
            "`target` must be finite, but it holds NaN or infinity. Leave out rows whose target is missing."
        )
    excess = torch.maximum(lower - widen(target), widen(target) - upper)
    return excess if scale is None else excess / scale


def conformal_interval(
    lower: Tensor, upper: Tensor, threshold: Tensor | float, scale: Tensor | None = None, *, validate: bool = True
) -> tuple[Tensor, Tensor]:
    """All targets whose :func:`interval_excess` is at most the threshold: from lower - threshold scale to upper + threshold scale.

    A negative threshold, which occurs if quantiles are too wide, narrows an interval. An interval narrowed to nothing has lower > upper and
    covers no target.

    Args:
        lower: Lower bounds [B, ...].
        upper: Upper bounds of the same shape.
        threshold: One number, or a tensor that broadcasts to that shape: [H, D], [D], or [B, ...] for groups (``thresholds[groups]``).
        scale: Positive standard deviations of the same shape; None for 1.
        validate: Whether to check the values, which waits for a GPU.

    Returns:
        Lower and upper bounds [B, ...] in float64, infinite where the threshold is.

    Raises:
        InputError: Shapes do not fit, a number is not finite, a scale is not positive, or the threshold is NaN.

    Example:
        >>> conformal_interval(torch.zeros(1, 1), torch.ones(1, 1), 0.5)
        (tensor([[-0.5000]], dtype=torch.float64), tensor([[1.5000]], dtype=torch.float64))
    """
    lower, upper, scale = _checked(lower, upper, scale, validate)
    margin = torch.as_tensor(threshold, dtype=lower.dtype, device=lower.device)
    if validate:
        check_no_nan("threshold", margin)
    shape = (1,) * (lower.ndim - margin.ndim) + tuple(margin.shape)
    if len(shape) != lower.ndim or any(own not in (1, size) for own, size in zip(shape, lower.shape, strict=True)):
        raise InputError(
            f"`threshold` must broadcast to the shape of the bounds {list(lower.shape)}, but its shape is {list(margin.shape)}."
        )
    margin = margin if scale is None else margin * scale
    return lower - margin, upper + margin


def _checked(
    lower: Tensor, upper: Tensor, scale: Tensor | None, validate: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bounds and scale in float64, finite and of one shape."""
    check_floating("lower", lower, 1, "[B, ...]")
    check_floating("upper", upper, 1, "[B, ...]")
    check_shape("upper", upper, lower.shape)
    for name, value in (("lower", lower), ("upper", upper)):
        if validate and not all_hold(value.isfinite()):
            raise InputError(f"`{name}` must be finite, but it holds NaN or infinity.")
    if scale is None:
        return widen(lower), widen(upper), None
    check_floating("scale", scale, 1, "[B, ...]")
    check_shape("scale", scale, lower.shape)
    if validate and not all_hold((scale > 0) & scale.isfinite()):
        raise InputError("`scale` must be positive and finite, but it holds other values.")
    return widen(lower), widen(upper), widen(scale)
