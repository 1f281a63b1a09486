"""Distance to the nearest training features, as an out-of-distribution score of any trained network."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES
from lightning_uq.callbacks.transformed_features import TransformedFeatures
from lightning_uq.errors import NotFittedError
from lightning_uq.functional.feature_transforms import FeatureTransform, transform_features
from lightning_uq.functional.ood_features import knn_distance
from lightning_uq.functional.precision import widen
from lightning_uq.functional.tail import TailFit, tail_score
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.row_sample import RowSample


class FitKNN(TransformedFeatures):
    """Deep nearest neighbours after training: the distance of an input's features to the ``k``-th nearest training row's.

    Features are scaled to length 1, unless ``feature_transform`` says otherwise. Those of at most ``max_rows`` training rows are kept, N x D numbers, in memory and in the
    ``-uq.ckpt`` (the paper finds 1 % of ImageNet to do). With ``pool="positions"`` each position of a map is a row. With
    :class:`OODDetection` the score ``knn`` is among those logged; an ensemble's is the mean of its members'. Labels are not
    looked at, but for the ``ignore_index`` of a segmentation.

    Args:
        k: Which neighbour; 50 is the paper's for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        max_rows: The largest number of training rows that are kept; above it a random sample of so many is, the same on any number
            of ranks. None keeps all.
        feature_transform: ``"direction"`` is the paper's: see :class:`TransformedFeatures`, as for ``held_out``.
        fitting: Arguments of :class:`FeatureCallback`: ``held_out``, ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name`` and
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

    def __init__(
        self,
        *,
        k: int = 50,
        max_rows: int | None = MAX_FEATURES,
        feature_transform: FeatureTransform = "direction",
        **fitting: Any,
    ) -> None:
        super().__init__(feature_transform=feature_transform, **fitting)
        RowSample(max_rows)
        self.max_rows = max_rows
        check_integer("k", k, 1)
        self.k = k
        self._banks: dict[FeatureTransform, Tensor] = {}
        self._tails: dict[FeatureTransform, TailFit] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on: ``k`` only where the tail of its distances is a part of it."""
        of_tails = {"k": self.k} if self.feature_transform == "combined" else {}
        return {**super().settings, **of_tails}

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """All rows' features [M, N, D] in their coordinates, and the tails of their scores where there are two."""
        features = self.gather_features(model, loader, trainer, self.max_rows)
        if features.shape[1] < self.k:
            warnings.warn(
                f"FitKNN was fitted to {features.shape[1]} rows, fewer than k={self.k}: the distance to the farthest is the "
                "score.",
                stacklevel=2,
            )
        banks = {name: transform_features(features, name).float() for name in self.coordinates}
        tails = self.fit_tails(model, trainer, lambda rows, name: self._distances(rows, name, banks[name]))
        tensors: dict[str, Any] = {"feature_layer": self.features.resolved}
        for name, bank in banks.items():
            tensors[f"{name}.features"] = bank
        for name, tail in tails.items():
            tensors.update({f"{name}.tail.{key}": value for key, value in tail._asdict().items()})
        return tensors

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Take the rows."""
        super().restore_tensors(tensors)
        self._banks, self._tails = {}, {}
        if tensors is not None:
            self._banks = {name: tensors[f"{name}.features"] for name in self.coordinates}
            if self.feature_transform == "combined":
                fields = TailFit._fields
                self._tails = {n: TailFit(*(tensors[f"{n}.tail.{key}"] for key in fields)) for n in self.coordinates}

    def feature_scores(self, features: Tensor) -> Tensor:
        """The distance [B] to the ``k``-th nearest row, for features [M, B, D], or its tail; the mean over members."""
        if not self._banks:
            raise NotFittedError("FitKNN is not fitted: train with it, or call `fit(model, loader)`.")
        scores = []
        for name in self.coordinates:
            self._banks[name] = self._banks[name].to(features.device)
            distance = self._distances(features, name, self._banks[name])
            if name in self._tails:
                self._tails[name] = TailFit(*(tensor.to(features.device) for tensor in self._tails[name]))
                distance = tail_score(distance, self._tails[name])
            scores.append(distance)
        return torch.stack(scores).amax(0)

    def _distances(self, features: Tensor, coordinates: FeatureTransform, bank: Tensor) -> Tensor:
        """The mean over members of the distance [B] to the ``k``-th nearest row of a bank [M, N, D']."""
        rows, k = transform_features(features, coordinates).to(bank.dtype), min(self.k, bank.shape[1])
        distances = [widen(knn_distance(r, b, k, normalize=False)) for r, b in zip(rows, bank, strict=True)]
        return torch.stack(distances).mean(0)
