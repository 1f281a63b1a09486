"""Acquisition of a core set: inputs that cover the pool in the space of features."""

import torch
from torch import Tensor

from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.errors import InputError


def core_set(pool: Tensor, labelled: Tensor, num: int) -> Tensor:
    """Positions [num] of a greedy k-center: one after the other, the input that is farthest from all labelled and chosen ones.

    The largest distance of an input to its nearest centre is at most twice the smallest that ``num`` centres can have.

    Args:
        pool: Features [P, D].
        labelled: Features of the labelled inputs [L, D], at least one.
        num: Number of positions.

    Raises:
        InputError: There are too few inputs, or no labelled one.

    Source: Sener & Savarese, "Active Learning for Convolutional Neural Networks", ICLR 2018.

    Example:
        >>> core_set(torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[0.0]]), 2)
        tensor([3, 1])
    """
    if not len(labelled) or len(pool) < num:
        raise InputError(
            f"`core_set` needs labelled inputs and a pool of at least {num}, but there are {len(labelled)} and {len(pool)}."
        )
    distance = torch.cat([torch.cdist(part, labelled).amin(1) for part in torch.split(pool, 1024)])
    chosen = []
    for _ in range(num):
        chosen.append(distance.argmax())
        distance = torch.minimum(distance, torch.cdist(pool, pool[chosen[-1], None]).squeeze(1))
        distance[chosen[-1]] = -1.0  # of copies of a chosen input, none is chosen twice
    return torch.stack(chosen)


class CoreSet(Strategy):
    """Inputs whose features cover the pool: :func:`core_set`.

    Cost: features of the pool and of the labelled inputs, P L distances, and P for each input that is acquired.

    Args:
        feature_layer: Name of the layer whose input are the features; ``"auto"`` finds the one that makes the outputs.
    """

    reference = "labelled"

    def __init__(self, feature_layer: str = "auto") -> None:
        self.feature_layer = feature_layer

    def rows(self, batch: PoolBatch) -> Rows:
        """The features [B, D]."""
        return (batch.features,)

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """A greedy k-center."""
        assert reference is not None
        return core_set(pool[0], reference[0], num)
