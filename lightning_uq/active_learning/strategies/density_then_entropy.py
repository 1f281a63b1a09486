"""Acquisition of inputs that are unlike the labelled ones, and among these of those that the classifier doubts."""

import torch
from torch import Tensor

from lightning_uq.active_learning.selection import select
from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.functional.validation import check_integer


class DensityThenEntropy(Strategy):
    """The ``shortlist * num`` inputs of the lowest log density, and among these the ones with the highest predictive entropy.

    An ambiguous input has a high entropy however many labels there are, but its features are as dense as those of the labelled inputs,
    so the shortlist leaves it out. Densities are compared as logarithms: in DDU's own code they underflow to 0 in
    float32, and its choice is then independent of the features.

    Cost: one prediction per input of the pool, of a module whose training fits :class:`~lightning_uq.FitGMM`.

    Args:
        shortlist: Size of the shortlist, in multiples of the inputs to acquire; 1 acquires by density alone.

    Source: Mukhoti et al., "Deep Deterministic Uncertainty", CVPR 2023, for the density.

    Example:
        >>> rows = torch.tensor([9.0, 8.0, 1.0]), torch.tensor([0.1, 0.6, 0.7])  # minus the log density, and the entropy
        >>> DensityThenEntropy(shortlist=2).choose(rows, 1, None, torch.Generator())
        tensor([1])
    """

    def __init__(self, shortlist: int = 10) -> None:
        check_integer("shortlist", shortlist, 1)
        self.shortlist = shortlist

    def rows(self, batch: PoolBatch) -> Rows:
        """Minus the log density, and the entropy in nats, each [B]."""
        prediction = batch.prediction
        return prediction.score("log_density"), prediction.score("predictive_entropy")

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """The highest entropies of the shortlist."""
        density, entropy = pool
        listed = select(density, min(self.shortlist * num, len(density)))
        return listed[select(entropy[listed], num)]
