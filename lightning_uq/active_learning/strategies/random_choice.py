"""Acquisition at random: the baseline of every strategy."""

import torch
from torch import Tensor

from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy


class RandomChoice(Strategy):
    """Inputs drawn at random: the baseline of every other strategy.

    Cost: the pool is read, but not predicted.

    Example:
        >>> sorted(RandomChoice().choose((torch.zeros(3),), 3, None, torch.Generator()).tolist())
        [0, 1, 2]
    """

    def rows(self, batch: PoolBatch) -> Rows:
        """Zeros [B]."""
        return (torch.zeros(len(batch)),)

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """The first positions of a permutation."""
        return torch.randperm(len(pool[0]), generator=generator)[:num]
