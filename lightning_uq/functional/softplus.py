"""Softplus in log space, and its inverse, which computes raw values from the parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast

_SMALL = -15.0  # below it, softplus equals exp in float32
_LARGE = 80.0  # its exponential still fits in a float32


def inverse_softplus(value: Tensor) -> Tensor:
    """The raw value whose softplus is ``value``: v + log(1 - exp(-v)), of the same shape.

    It does not overflow: for large v it is v, and for small v it is log v. Half precision is upcast to float32 first.

    Args:
        value: Positive numbers; a zero gives minus infinity.

    Raises:
        InputError: ``value`` is not floating point.

    Example:
        >>> inverse_softplus(torch.tensor([0.01, 1.0, 100.0]))
        tensor([ -4.6002,   0.5413, 100.0000])
    """
    value = _checked(value, "value")
    return value + torch.log(-torch.expm1(-value))


def inverse_softplus_exp(log_value: Tensor) -> Tensor:
    """The raw value whose softplus is exp(``log_value``), without underflow of the value; exp is capped at e^80.

    Args:
        log_value: Logarithms of any shape.

    Raises:
        InputError: ``log_value`` is not floating point.

    Example:
        >>> inverse_softplus_exp(torch.tensor([-200.0, 0.0, 3.0]))
        tensor([-200.0000,    0.5413,   20.0855])
    """
    log_value = _checked(log_value, "log_value")
    return torch.where(log_value < _SMALL, log_value, inverse_softplus(log_value.clamp(_SMALL, _LARGE).exp()))


def log_softplus(raw: Tensor) -> Tensor:
    """log softplus(``raw``), which equals ``raw`` far below zero.

    Args:
        raw: Numbers of any shape.

    Raises:
        InputError: ``raw`` is not floating point.

    Example:
        >>> log_softplus(torch.tensor([-200.0, 0.0, 20.0855]))
        tensor([-200.0000,   -0.3665,    3.0000])
    """
    raw = _checked(raw, "raw")
    return torch.where(raw < _SMALL, raw, F.softplus(raw.clamp_min(_SMALL)).log())


def _checked(x: Tensor, name: str) -> Tensor:
    if not x.is_floating_point():
        raise InputError(f"`{name}` must be floating point, but its dtype is {x.dtype}.")
    return upcast(x)
