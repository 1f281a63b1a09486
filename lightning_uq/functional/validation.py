"""Checks of arguments. Each raises an :class:`~lightning_uq.errors.InputError` with what must hold, what was found, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.waiting import read_scalars

# Tolerance for the sum of a row of probabilities: generous for the rounding of each dtype. A float32 tensor may come from a
# half-precision softmax, so its tolerance is wide; logits exceed all tolerances by far.
_SUM_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def _error(name: str, must: str, found: str, advice: str = "") -> InputError:
    """The error of all checks: what must hold, what was found, and what to do."""
    return InputError(f"`{name}` must {must}, but {found}.{advice and ' ' + advice}")


def check_integer(name: str, value: int, minimum: int) -> None:
    """Refuse values other than an int of at least ``minimum``.

    Example:
        >>> check_integer("tau", 0, 1)
        Traceback (most recent call last):
        lightning_uq.errors.InputError: `tau` must be an integer of at least 1, but it is 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _error(name, f"be an integer of at least {minimum}", f"it is {value!r}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Refuse a number below ``minimum``, and NaN."""
    if not value >= minimum:
        raise _error(name, f"be at least {minimum}", f"it is {value!r}")


def check_positive(**numbers: float) -> None:
    """Refuse numbers, passed by name, that are not positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise _error(name, "be positive and finite", f"it is {number!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a string that is not one of ``choices``."""
    if value not in choices:
        raise _error(name, f"be one of {', '.join(map(repr, choices))}", f"it is {value!r}")


def check_bool(name: str, value: bool) -> None:
    """Refuse values other than True and False."""
    if not isinstance(value, bool):
        raise _error(name, "be True or False", f"it is {value!r}")


def check_open_unit(name: str, value: float) -> None:
    """Refuse a number that is not strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise _error(name, "be a number in (0, 1)", f"it is {value!r}")


def check_closed_unit(name: str, value: float) -> None:
    """Refuse a number that is not between 0 and 1, both included.

    Example:
        >>> check_closed_unit("alpha", 10)
        Traceback (most recent call last):
        lightning_uq.errors.InputError: `alpha` must be a number in [0, 1], but it is 10.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise _error(name, "be a number in [0, 1]", f"it is {value!r}")


def check_tensor(name: str, value: object, axes: str = "") -> None:
    """Refuse objects other than a tensor, described by its ``axes``."""
    if not isinstance(value, Tensor):
        raise _error(name, f"be a tensor {axes}".rstrip(), f"it is a {type(value).__name__}")


def check_floating(name: str, value: Tensor, ndim: int, axes: str) -> None:
    """Refuse a tensor that is not floating point or has fewer than ``ndim`` axes, described as ``axes``."""
    check_tensor(name, value, axes)
    if not value.is_floating_point() or value.ndim < ndim:
        raise _error(name, f"be a floating-point tensor {axes}", f"it is {describe(value)}")


def check_shape(name: str, value: Tensor, *shapes: torch.Size, advice: str = "") -> None:
    """Refuse a tensor with none of these shapes, even if it would broadcast to one of them.

    Example:
        >>> check_shape("target", torch.zeros(3), torch.Size([3, 1]))
        Traceback (most recent call last):
        lightning_uq.errors.InputError: `target` must have shape [3, 1], but its shape is [3].
    """
    if value.shape not in shapes:
        expected = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
        raise _error(name, f"have shape {expected}", f"its shape is {list(value.shape)}", advice)


def check_class_indices(name: str, value: Tensor) -> None:
    """Refuse a tensor without an integer dtype."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise _error(name, "hold class indices of an integer dtype", f"its dtype is {value.dtype}")


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Refuse a target that is not a tensor of class indices of exactly this shape."""
    check_tensor("target", target, "of class indices")
    check_class_indices("target", target)
    check_shape("target", target, shape)


def check_probs_values(probs: Tensor, name: str = "probs") -> None:
    """Refuse probabilities [N, C] that hold NaN, leave [0, 1] or do not sum to one along the class axis."""
    if probs.numel() == 0:
        return
    tolerance = _SUM_TOLERANCE.get(probs.dtype, 5e-3)
    wide = upcast(probs)
    total = wide.sum(1)
    low_value, smallest, largest = read_scalars(wide.amin(), *total.aminmax())
    gap = max(1 - smallest, largest - 1)
    if low_value >= 0 and gap <= tolerance:  # false for NaN; no value can exceed the sum of its row
        return
    high_value = float(wide.amax())
    advice = "If they are logits, pass `from_logits=True`."
    if math.isnan(low_value) or math.isnan(high_value):
        raise _error(name, "hold probabilities", "it holds NaN")
    if low_value < 0 or high_value > 1 + tolerance:
        wrong = low_value if low_value < 0 else high_value
        raise _error(name, "hold probabilities in [0, 1]", f"it holds {wrong:g}", advice)
    worst = float(total[(total - 1).abs().argmax()])
    raise _error(name, f"sum to one over the class axis (within {tolerance:g})", f"a sum is {worst:g}", advice)


def check_target_values(target: Tensor, num_classes: int, name: str = "target") -> None:
    """Refuse class indices outside [0, num_classes)."""
    if target.numel() == 0:
        return
    low, high = read_scalars(*target.aminmax())
    if low < 0 or high >= num_classes:
        found = f"it holds {low if low < 0 else high}"
        raise _error(name, f"hold class indices in [0, {num_classes})", found)


def all_hold(conditions: Tensor) -> bool:
    """Whether all conditions hold; assumed in a graph, which has no values."""
    return torch.compiler.is_compiling() or bool(conditions.all())


def check_no_nan(name: str, value: Tensor) -> None:
    """Refuse a tensor that holds NaN."""
    if not all_hold(~value.isnan()):
        raise _error(name, "hold numbers", "it holds NaN")


def describe(value: object) -> str:
    """A tensor's dtype and shape, or the type of anything else, for an error.

    Example:
        >>> describe(torch.zeros(2)), describe([0.0])
        ('torch.float32 of shape [2]', 'a list')
    """
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def flatten_classes(x: Tensor) -> Tensor:
    """[B, C, ...] -> [N, C]: every further position becomes a row."""
    return x if x.ndim == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def classification_rows(probs: Tensor, target: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Check probabilities [B, C, ...] and class indices [B, ...], and return them as rows [N, C] and [N].

    Shapes and dtypes are always checked; with ``validate`` also the values, which costs a pass over the data.
    """
    check_floating("probs", probs, 2, "[B, C, ...]")
    check_target(target, probs.shape[:1] + probs.shape[2:])
    probs, target = flatten_classes(probs), target.reshape(-1).long()
    if validate:
        check_probs_values(probs)
        check_target_values(target, probs.shape[1])
    return probs, target


def one_per_row(name: str, values: object, num_rows: int) -> Tensor:
    """Check that a function of the input has returned one number per row [N].

    Raises:
        InputError: The value is not a tensor of that shape.
    """
    if not isinstance(values, Tensor) or values.shape != (num_rows,):
        came = (
            f"its shape is {list(values.shape)}" if isinstance(values, Tensor) else f"it is a {type(values).__name__}"
        )
        raise InputError(
            f"`{name}` must be a tensor with one number per row, [{num_rows}], but {came}. It cannot have one per position of a map."
        )
    return values
