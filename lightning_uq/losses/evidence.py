"""Evidence: non-negative numbers, one per class, computed from a network's raw outputs."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_choice, check_positive

Evidence = Literal["clamped_exp", "softplus", "relu"] | Callable[[Tensor], Tensor]


def clamped_exp(x: Tensor, clamp: float = 10.0) -> Tensor:
    """exp(min(max(x, -clamp), clamp)): evidence that neither overflows nor reaches zero.

    The gradient is kept at the bounds and is zero beyond them. Half precision is upcast to float32.

    Args:
        x: Raw outputs of any shape.
        clamp: Bound of the exponent; 10 gives evidence between 4.5e-5 and 22026.

    Raises:
        InputError: ``clamp`` is not positive.

    Example:
        >>> clamped_exp(torch.tensor([0.0, 1e9]))
        tensor([1.0000e+00, 2.2026e+04])
    """
    check_positive(clamp=clamp)
    x = upcast(x)
    # The gradient of torch's clamp at a bound depends on torch's version.
    return torch.where(x.abs() <= clamp, x, x.detach().clamp(-clamp, clamp)).exp()


def evidence_function(name: Evidence) -> Callable[[Tensor], Tensor]:
    """The function from raw outputs to evidence: one of three names, or a function itself.

    ReLU has no gradient if all raw outputs of a row are negative, so such samples are never learned (Pandey & Yu, ICML 2023,
    arXiv 2306.11113).

    Raises:
        InputError: The name is unknown.

    Example:
        >>> evidence_function("softplus")(torch.zeros(1))
        tensor([0.6931])
    """
    if callable(name):
        return name
    check_choice("evidence", name, tuple(_EVIDENCE))
    return _EVIDENCE[name]


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(upcast(x))


def _relu(x: Tensor) -> Tensor:
    return F.relu(upcast(x))


_EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {"clamped_exp": clamped_exp, "softplus": _softplus, "relu": _relu}
