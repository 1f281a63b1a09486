"""Weighted sums of losses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.losses.index import takes_indices


class CombinedLoss(nn.Module):
    """sum_i weight_i * loss_i, for losses of outputs and targets, or for regularizers of a network and its inputs.

    All are called with the same arguments. Losses that are modules become submodules, so their state moves and is saved with this
    one. State that the network records (BatchNorm statistics) stays in the network.

    If one of the losses is a loss over indices (:class:`JointLoss`), so is the sum, and the other losses are averaged over the
    indices.

    Args:
        losses: The losses.
        weights: One weight per loss; default 1.

    Raises:
        InputError: There is no loss, or the number of weights differs.

    Example:
        >>> loss = CombinedLoss([nn.CrossEntropyLoss(), lambda output, target: output.square().mean()], [1.0, 0.5])
        >>> loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.6931)
    """

    def __init__(self, losses: Sequence[Callable[..., Tensor]], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if not losses or len(weights) != len(losses):
            raise InputError(
                f"`losses` and `weights` must have the same length of at least 1, but they have {len(losses)} and "
                f"{len(weights)} elements."
            )
        self.losses = list(losses)
        self.weights = weights
        self.modules_of_losses = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))

    @property
    def over_indices(self) -> bool:
        """Whether the sum takes the outputs of all indices, because one of the losses does."""
        return any(takes_indices(loss) for loss in self.losses)

    def forward(self, *args: Any) -> Tensor:
        """The weighted sum of all losses, each called with ``args``."""
        values = [weight * self._value(loss, args) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return sum(values[1:], start=values[0])

    def _value(self, loss: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        if takes_indices(loss) or not self.over_indices:
            return loss(*args)
        output, target = args
        return torch.stack([loss(member, target) for member in output]).mean()
