"""The three reductions of losses."""

from typing import Literal

from torch import Tensor

from lightning_uq.functional.validation import check_choice

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str) -> None:
    """Refuse names other than the three.

    Raises:
        InputError: The name is unknown.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def reduce(losses: Tensor, reduction: Reduction, total: Tensor | int | None = None) -> Tensor:
    """Return losses unchanged (``"none"``), or their sum or mean.

    Args:
        losses: Losses of any shape.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        total: Divisor of the mean, such as a sum of weights. Without it the mean divides by the number of elements.

    Raises:
        InputError: ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([1.0, 3.0]), "mean"), reduce(torch.tensor([1.0, 3.0]), "mean", total=4)
        (tensor(2.), tensor(1.))
    """
    check_reduction(reduction)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if total is None else losses.sum() / total
