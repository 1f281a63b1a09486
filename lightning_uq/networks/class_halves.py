"""Class statistics streamed in two halves of the rows, so that one half can evaluate the fit of the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_uq.functional.gaussian import (
    ClassMoments,
    Covariance,
    GaussianFit,
    PlainMoments,
    Priors,
    Regularization,
    fit_gaussian,
)
from lightning_uq.functional.hashing import chain, chain_last
from lightning_uq.functional.held_out_shrinkage import Shrinkage, held_out_shrinkage
from lightning_uq.networks.class_statistics import ClassStatistics

_OPERATIONS = 2e9
"""The choice of a shrinkage uses as many classes as fit into about this many operations for matrix products, since a few classes determine it."""

_SEED = chain(1)


class ClassHalves:
    """The :class:`ClassStatistics` of all rows and, for a shrinkage by held-out likelihood, those of a random half separately.

    A row's half follows only from its number, so batches and ranks make no difference. The second half is kept for as many
    classes as fit into ``memory_budget`` beside the first one. The fit uses both halves together.

    Args:
        num_classes: C.
        num_features: D.
        covariance: "full", "tied" or "diagonal".
        memory_budget: The largest memory of all scatter matrices, in bytes.
        device: The device of the sums.
        copies: The number of such statistics that share the budget.
        halved: Whether to keep halves; False for a regularization that does not need them.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
        >>> halves = ClassHalves(num_classes=1, num_features=1)
        >>> halves.update(x, torch.zeros(4, dtype=torch.long), numbers=torch.arange(4))
        >>> halves.fit("full", "uniform", "held_out").mean
        tensor([[3.7500]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        covariance: Covariance = "full",
        memory_budget: int = 4 * 2**30,
        device: torch.device | str = "cpu",
        copies: int = 1,
        halved: bool = True,
    ) -> None:
        self.first = ClassStatistics(num_classes, num_features, covariance, memory_budget, device, copies)
        self.second: ClassStatistics | None = None
        self.classes = torch.empty(0, dtype=torch.long)
        if halved and covariance != "tied":
            of_class = num_features * (num_features if covariance == "full" else 1)
            by_memory = memory_budget // (8 * of_class * copies) - num_classes
            number = min(num_classes, max(2, min(by_memory, int(_OPERATIONS / num_features**3))))
            self.classes = torch.linspace(0, num_classes - 1, number).round().long()
            self.second = ClassStatistics(number, num_features, covariance, memory_budget, device)

    @property
    def num_features(self) -> int:
        """D."""
        return self.first.num_features

    def update(self, features: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Add rows.

        Args:
            features: [N, D].
            labels: Class indices [N].
            numbers: The number [N] of each row's sample in the data set. All rows of a sample, such as its pixels, are in the same half.
        """
        if self.second is None:
            self.first.update(features, labels)
            return
        place = torch.full((self.first.num_classes,), -1)
        place[self.classes] = torch.arange(len(self.classes))
        places = place.to(labels.device)[labels.long().clamp(0, self.first.num_classes - 1)]
        apart = (chain_last(_SEED, numbers).to(labels.device) & 1).bool() & (places >= 0)
        self.first.update(features[~apart.to(features.device)], labels[~apart])
        self.second.update(features[apart.to(features.device)], places[apart])

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Turn this into the statistics of all ranks: see :meth:`ClassStatistics.reduce`."""
        self.first.reduce(all_sum)
        if self.second is not None:
            self.second.reduce(all_sum)

    def fit(
        self, covariance: Covariance, priors: Priors, regularization: Regularization, absent: int | None = None
    ) -> GaussianFit:
        """Fit the rows of both halves, which are then merged: see :func:`~lightning_uq.functional.gaussian.fit_gaussian`.

        With ``"held_out"``, classes with too few rows for a fit of one half use ``"oas"``.
        """
        chosen: Regularization | Shrinkage = regularization
        if regularization == "held_out":
            second = self.second
            found = None if second is None else held_out_shrinkage(self._first_of(self.classes), second)
            chosen = "oas" if found is None else found
        if self.second is not None:
            self.first.merge(self.second, self.classes)
            self.second = None
        return fit_gaussian(self.first, covariance, priors, chosen, absent)

    def _first_of(self, classes: Tensor) -> ClassMoments:
        first = self.first
        if len(classes) == first.num_classes:
            return first
        return PlainMoments(first.covariance, first.count[classes], first.mean[classes], first.scatter[classes])
