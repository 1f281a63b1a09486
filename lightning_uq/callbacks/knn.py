"""Distance to the nearest training features, as an out-of-distribution score of any trained network."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import NotFittedError
from lightning_uq.functional.ood_features import NeighborBank, neighbor_bank, neighbor_distance
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.row_sample import RowSample


class FitKNN(FeatureCallback):
    """Deep nearest neighbours after training: the distance of an input's features to the ``k``-th nearest training row's.

    Features are scaled to length 1. Those of at most ``max_rows`` training rows are kept, N x D numbers, in the ``-uq.ckpt`` (the
    paper finds 1 % of ImageNet to do), and while inputs are scored in memory too, in float64. With ``pool="positions"`` each position of a map is a row. With
    :class:`OODDetection` the score ``knn`` is among those logged; an ensemble's is the mean of its members'. Labels are not
    looked at, but for the ``ignore_index`` of a segmentation.

    Args:
        k: Which neighbour; 50 is the paper's for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        max_rows: The largest number of training rows that are kept; above it a random sample of so many is, the same on any number
            of ranks. None keeps all.
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

    def __init__(self, *, k: int = 50, max_rows: int | None = MAX_FEATURES, **fitting: Any) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows
        check_integer("k", k, 1)
        self.k = k
        self._rows: Tensor | None = None
        self._banks: list[NeighborBank] = []

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """All rows' features [M, N, D]."""
        features = self.gather_features(model, loader, trainer, self.max_rows)
        if features.shape[1] < self.k:
            warnings.warn(
                f"FitKNN was fitted to {features.shape[1]} rows, fewer than k={self.k}: the distance to the farthest is the "
                "score.",
                stacklevel=2,
            )
        return {"feature_layer": self.features.resolved, "features": features}

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Take the rows."""
        super().restore_tensors(tensors)
        self._rows = None if tensors is None else tensors["features"]
        self._banks = []

    def feature_scores(self, features: Tensor) -> Tensor:
        """The distance [B] to the ``k``-th nearest row, for features [M, B, D]; the mean over members."""
        if self._rows is None:
            raise NotFittedError("FitKNN is not fitted: train with it, or call `fit(model, loader)`.")
        if self._rows.device != features.device or not self._banks:
            self._rows = self._rows.to(features.device)
            self._banks = [neighbor_bank(rows) for rows in self._rows]
        k = min(self.k, self._rows.shape[1])
        distances = [neighbor_distance(one, bank, k) for one, bank in zip(features, self._banks, strict=True)]
        return torch.stack(distances).mean(0).to(wide_dtype(features.device)).to(features.device)
