"""Losses of one number per target."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.functional.precision import upcast_together
from lightning_uq.functional.validation import check_choice, check_shape
from lightning_uq.losses.reduction import Reduction, reduce

_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def point_loss(mean: Tensor, target: Tensor, kind: str = "mse", reduction: Reduction = "mean") -> Tensor:
    """The squared error (``"mse"``), the absolute error (``"l1"``) or the Huber loss with delta = 1 (``"huber"``).

    Args:
        mean: Means [B, D].
        target: Targets of the same shape.
        kind: Name of the loss.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"``.

    Raises:
        InputError: The shapes differ, or ``kind`` or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> point_loss(torch.zeros(2), torch.tensor([0.5, 3.0]), "huber", reduction="none")
        tensor([0.1250, 2.5000])
    """
    check_choice("kind", kind, tuple(_LOSSES))
    check_shape("target", target, mean.shape, advice="An array of another shape would broadcast.")
    return reduce(_LOSSES[kind](*upcast_together(mean, target), reduction="none"), reduction)
