"""Mean and standard deviation of the targets, so that a network works in standardised units and predictions in the data's units."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError

Scale = float | Sequence[float]
TargetScale = tuple[Scale, Scale]
"""Mean and standard deviation, each a number or one number per target dimension."""


def scale_tensors(target_scale: TargetScale | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each [D] or [1], with the dtype and device of ``like``; for None, 0 and 1.

    Example:
        >>> import torch
        >>> scale_tensors((1.0, (2.0, 3.0)), torch.zeros(2))
        (tensor([1.]), tensor([2., 3.]))
    """
    mean, std = target_scale or (0.0, 1.0)
    return _as_tensor(mean, like), _as_tensor(std, like)


def standardized_target(target_scale: TargetScale | None, target: Tensor) -> Tensor:
    """A target [..., D] in standardised units.

    Example:
        >>> import torch
        >>> standardized_target((1.0, 2.0), torch.tensor([[5.0]]))
        tensor([[2.]])
    """
    if target_scale is None:
        return target
    mean, std = scale_tensors(target_scale, target)
    return (target - mean) / std


def check_scale_dims(target_scale: TargetScale | None, dims: int) -> None:
    """Raise an :class:`InputError` if the scale has another number of target dimensions."""
    for given in target_scale or ():
        if not isinstance(given, float) and len(given) != dims:
            raise InputError(
                f"`target_scale` must hold single numbers, or {dims} of each, one per target dimension, but it is "
                f"{target_scale!r}."
            )


def _as_tensor(part: Scale, like: Tensor) -> Tensor:
    # A tensor made from a list is copied to the GPU, which waits for it.
    return like.new_full((1,), part) if isinstance(part, float) else like.new_tensor(part)


def checked_scale(scale: Any) -> TargetScale | None:
    """Mean and standard deviation as plain numbers or tuples, so that a task stays plain data."""
    if scale is None:
        return None
    try:
        mean, std = (_numbers(part) for part in scale)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`target_scale` must be (mean, std), each a number or one number per target dimension, but it is {scale!r}."
        ) from error
    for name, part, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if not all(math.isfinite(value) and value > least for value in ([part] if isinstance(part, float) else part)):
            must = "finite" if name == "mean" else "positive and finite"
            raise InputError(f"The {name} in `target_scale` must be {must}, but it is {part!r}.")
    return mean, std


def _numbers(part: Any) -> float | tuple[float, ...]:
    values = part.tolist() if hasattr(part, "tolist") else part
    return float(values) if isinstance(values, int | float) else tuple(float(value) for value in values)
