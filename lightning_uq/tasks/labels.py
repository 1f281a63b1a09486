"""Shared by tasks with binary labels: the fields of their loss, and checks of targets."""

import math
import numbers
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_at_least, check_choice


def check_label_loss(loss: str, label_smoothing: Any, focal_gamma: Any) -> None:
    """Raise an :class:`InputError` for an unknown loss, or if smoothing or gamma is out of range."""
    check_choice("loss", loss, ("bce", "focal"))
    if not isinstance(label_smoothing, numbers.Real) or not 0 <= float(label_smoothing) <= 1:
        raise InputError(f"`label_smoothing` must lie in [0, 1], but it is {label_smoothing!r}.")
    check_at_least("focal_gamma", focal_gamma, 0)


def checked_pos_weight(pos_weight: Any) -> float | tuple[float, ...] | None:
    """A positive weight as plain data; raises an :class:`InputError` if it is unusable."""
    if pos_weight is None:
        return None
    values = pos_weight.tolist() if hasattr(pos_weight, "tolist") else pos_weight
    each = [values] if isinstance(values, numbers.Real) else values
    try:
        weights = tuple(float(value) for value in each)
    except (TypeError, ValueError) as error:
        raise InputError(f"`pos_weight` must be a number, or one per label, but it is {pos_weight!r}.") from error
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"`pos_weight` must be positive and finite, but it is {pos_weight!r}.")
    return weights[0] if isinstance(values, numbers.Real) else weights


def known_labels(target: Tensor, ignore_index: int | None = None) -> Tensor:
    """Labels as numbers, with NaN for unknown labels."""
    values = target if target.is_floating_point() else target.to(torch.get_default_dtype())
    return values if ignore_index is None else torch.where(target == ignore_index, math.nan, values)


def check_label_values(values: Tensor, advice: str) -> None:
    """Raise an :class:`InputError` unless all known labels lie in [0, 1]; integers are then 0 or 1."""
    known = values[~values.isnan()]
    if known.numel():
        low, high = torch.stack(known.aminmax()).tolist()
        if low < 0 or high > 1:
            raise InputError(
                f"The targets must be 0 or 1, or a probability in between, but their values go from {low:g} to {high:g}. {advice}"
            )


def warn_of_probabilities(outputs: Tensor) -> None:
    """Warn if raw outputs look like probabilities: single logits often lie in [0, 1], but rarely all of a batch."""
    values = outputs.detach()
    if values.numel() >= 32 and bool(((values >= 0) & (values <= 1)).all()) and bool(values.amin() < values.amax()):
        rank_zero_warn(
            "All outputs of the network's first batch lie in [0, 1], as probabilities do, but they are read as logits. If the network ends "
            "with a sigmoid, pass `output=torch.logit`."
        )
