"""Distance to the nearest training features, as an out-of-distribution score of any trained network."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.errors import NotFittedError
from lightning_uq.functional.ood_features import knn_distance
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_integer


class FitKNN(FeatureCallback):
    """Deep nearest neighbours after training: the distance of an input's features to the ``k``-th nearest training row's.

    Features are scaled to length 1. All of the training set's are kept, N x D numbers, in memory and in the ``-uq.ckpt``; for
    a large set pass a subset as ``dataloader`` (the paper finds 1 % of ImageNet to do). With :class:`OODDetection` the score
    ``knn`` is among those logged; an ensemble's is the mean of its members'. Labels are not looked at.

    Args:
        k: Which neighbour; 50 is the paper's for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name`` and
            the like.

    Raises:
        InputError: The features hold NaN, or there is no fitting data.

    Warns:
        UserWarning: There are fewer than ``k`` rows; the farthest is then the one that counts.

    Source: Sun et al., ICML 2022 (arXiv 2204.06507).

    Example:
        >>> network = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        >>> knn = FitKNN(k=1).fit(network, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        >>> knn.score(network, [torch.tensor([[5.0, 0.0], [-1.0, 0.0]])])  # the nearest to the second is a right angle off
        tensor([0.0000, 1.4142], dtype=torch.float64)
    """

    score_name = "knn"

    def __init__(self, *, k: int = 50, **fitting: Any) -> None:
        super().__init__(**fitting)
        check_integer("k", k, 1)
        self.k = k
        self._bank: Tensor | None = None

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """All rows' features [M, N, D], scaled to length 1."""
        features = self.gather_features(model, loader, trainer)
        if features.shape[1] < self.k:
            warnings.warn(
                f"FitKNN was fitted to {features.shape[1]} rows, fewer than k={self.k}: the distance to the farthest is the "
                "score.",
                stacklevel=2,
            )
        bank = nn.functional.normalize(features, dim=2)
        return {"feature_layer": self.features.resolved, "features": bank}

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Take the rows."""
        super().restore_tensors(tensors)
        self._bank = None if tensors is None else tensors["features"]

    def feature_scores(self, features: Tensor) -> Tensor:
        """The distance [B] to the ``k``-th nearest row, for features [M, B, D]; the mean over members."""
        if self._bank is None:
            raise NotFittedError("FitKNN is not fitted: train with it, or call `fit(model, loader)`.")
        self._bank = bank = self._bank.to(features.device)
        rows = nn.functional.normalize(features, dim=2)
        k = min(self.k, bank.shape[1])
        distances = [widen(knn_distance(r, b, k, normalize=False)) for r, b in zip(rows, bank, strict=True)]
        return torch.stack(distances).mean(0)
