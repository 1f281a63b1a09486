"""Negative log-likelihood of a Student-t, and the layout of its parameters in one output tensor."""

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.student_t import student_t_log_prob
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.reduction import Reduction, reduce

MIN_SCALE = 1e-3
"""Added to the softplus of a raw scale: the square root of a Gaussian head's smallest variance."""
MIN_DEGREES_OF_FREEDOM = 2.01
"""Added to the softplus of raw degrees of freedom: the variance exists only above 2."""


def split_student_t(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Location, scale and degrees of freedom, each [..., D], of a regression output [..., 3 D], in that order.

    scale = softplus(raw) + 0.001 and df = softplus(raw) + 2.01, so the variance is at most 201 scale^2. Half precision is
    upcast to float32.

    Raises:
        InputError: The last axis is not a multiple of 3.

    Example:
        >>> import torch
        >>> [x.item() for x in split_student_t(torch.tensor([1.0, -200.0, -200.0]))]
        [1.0, 0.0010000000474974513, 2.009999990463257]
    """
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % 3:
        raise InputError(
            "`output` must have shape [..., 3 D], D locations, D raw scales and D raw degrees of freedom, but its shape is "
            f"{list(output.shape)}."
        )
    location, scale, df = upcast(output).chunk(3, dim=-1)
    return location, F.softplus(scale) + MIN_SCALE, F.softplus(df) + MIN_DEGREES_OF_FREEDOM


def student_t_nll_loss(
    location: Tensor, scale: Tensor, degrees_of_freedom: Tensor, target: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Negative log-density of a Student-t, in nats, computed in float64.

    Args:
        location: Locations [B, D].
        scale: Scales of the same shape, above zero.
        degrees_of_freedom: Degrees of freedom of the same shape, above zero.
        target: Targets of the same shape.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"``.

    Raises:
        InputError: The shapes differ, or ``reduction`` is unknown.

    Source: Lange et al., JASA 84 (1989).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> student_t_nll_loss(0 * one, one, 3 * one, 0 * one)
        tensor(1.0009)
    """
    for name, value in (("scale", scale), ("degrees_of_freedom", degrees_of_freedom), ("target", target)):
        check_shape(name, value, location.shape)
    losses = -student_t_log_prob(target, degrees_of_freedom, location, scale)
    return reduce(losses.to(upcast(location).dtype), reduction)
