"""Checks and conversions that the functionals and the metrics share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast

# How far a row of probabilities may sum from one: the rounding of that dtype, generously. A float32 tensor may have
# come from a half-precision softmax, so its tolerance is wide; logits miss all of these by far.
_SUM_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def check_integer(name: str, value: int, minimum: int) -> None:
    """Refuse anything but an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"Expected argument `{name}` to be an integer of at least {minimum}, but got {value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a string that is not one of ``choices``."""
    if value not in choices:
        raise InputError(f"Expected argument `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_bool(name: str, value: bool) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise InputError(f"Expected argument `{name}` to be True or False, but got {value!r}.")


def check_open_unit(name: str, value: float) -> None:
    """Refuse a number that is not strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(f"Expected argument `{name}` to be a number in (0, 1), but got {value!r}.")


def check_floating(name: str, value: Tensor, ndim: int, axes: str) -> None:
    """Refuse a tensor that is not floating point or has fewer than ``ndim`` axes, described as ``axes``."""
    if not isinstance(value, Tensor):
        raise InputError(f"Expected argument `{name}` to be a tensor {axes}, but got {type(value).__name__}.")
    if not value.is_floating_point() or value.ndim < ndim:
        raise InputError(
            f"Expected argument `{name}` to be a floating-point tensor {axes}, but got {value.dtype} of shape "
            f"{list(value.shape)}."
        )


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Refuse a target that is not a tensor of class indices of exactly this shape."""
    if not isinstance(target, Tensor):
        raise InputError(
            f"Expected argument `target` to be a tensor of class indices, but got {type(target).__name__}."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InputError(
            f"Expected argument `target` to hold class indices of an integer dtype, but got {target.dtype}."
        )
    if target.shape != shape:
        raise InputError(f"Expected argument `target` to be of shape {list(shape)}, but got {list(target.shape)}.")


def check_probs_values(probs: Tensor, name: str = "probs") -> None:
    """Refuse probabilities [N, C] that hold NaN, leave [0, 1] or do not sum to one along the class axis."""
    if probs.numel() == 0:
        return
    tolerance = _SUM_TOLERANCE.get(probs.dtype, 5e-3)
    wide = upcast(probs)
    low, high = wide.aminmax()
    total = wide.sum(1)
    low_value, high_value, gap = torch.stack([low, high, (total - 1).abs().amax()]).tolist()
    hint = "; logits go in with `from_logits=True`"
    if math.isnan(low_value) or math.isnan(high_value):
        raise InputError(f"Expected argument `{name}` to hold probabilities, but got NaN.")
    if low_value < 0 or high_value > 1 + tolerance:
        wrong = low_value if low_value < 0 else high_value
        raise InputError(f"Expected argument `{name}` to hold probabilities in [0, 1]{hint}, but got {wrong:g}.")
    if not gap <= tolerance:
        worst = float(total[(total - 1).abs().argmax()])
        raise InputError(
            f"Expected argument `{name}` to sum to one over the class axis (within {tolerance:g}){hint}, but got a sum of "
            f"{worst:g}."
        )


def check_target_values(target: Tensor, num_classes: int) -> None:
    """Refuse class indices outside [0, num_classes)."""
    if target.numel() == 0:
        return
    low, high = torch.stack(target.aminmax()).tolist()
    if low < 0 or high >= num_classes:
        raise InputError(
            f"Expected argument `target` to hold class indices in [0, {num_classes}), but got "
            f"{low if low < 0 else high}."
        )


def check_no_nan(name: str, value: Tensor) -> None:
    """Refuse a tensor that holds NaN."""
    if bool(value.isnan().any()):
        raise InputError(f"Expected argument `{name}` to hold numbers, but got NaN.")


def flatten_classes(x: Tensor) -> Tensor:
    """[B, C, ...] -> [N, C]: every further position is a row of its own."""
    return x if x.ndim == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def classification_rows(probs: Tensor, target: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Probabilities [B, C, ...] and class indices [B, ...] as checked rows [N, C] and [N].

    Shapes and dtypes are always checked; values, which cost a pass over the data, where ``validate`` is set.
    """
    check_floating("probs", probs, 2, "[B, C, ...]")
    check_target(target, probs.shape[:1] + probs.shape[2:])
    probs, target = flatten_classes(probs), target.reshape(-1).long()
    if validate:
        check_probs_values(probs)
        check_target_values(target, probs.shape[1])
    return probs, target
