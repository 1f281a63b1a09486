"""Distance to the nearest training features, as an out-of-distribution score of any trained network."""

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.coordinates import FeatureCoordinates
from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import NotFittedError
from lightning_uq.functional.feature_transforms import FeatureTransform, transform_features
from lightning_uq.functional.ood_features import NeighborBank, neighbor_bank, neighbor_distance
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.tail import TailFit, tail_score
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.row_sample import RowSample

Banks = dict[FeatureTransform, list[NeighborBank]]
"""The prepared rows of each member, by their coordinates."""


class FitKNN(FeatureCallback):
    """Deep nearest neighbours after training: the distance of an input's features to the ``k``-th nearest training row's.

    Features are scaled to length 1, unless ``feature_transform`` says otherwise. Those of at most ``max_rows`` training rows are kept, N x D numbers, in the ``-uq.ckpt`` (the
    paper finds 1 % of ImageNet to do), and while inputs are scored in memory too, in float64. With ``pool="positions"`` each position of a map is a row. With
    :class:`OODDetection` the score ``knn`` is among those logged; an ensemble's is the mean of its members'. Labels are not
    looked at, but for the ``ignore_index`` of a segmentation.

    Args:
        k: Which neighbour; 50 is the paper's for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        max_rows: The largest number of training rows that are kept; above it a random sample of so many is, the same on any number
            of ranks. None keeps all.
        feature_transform: ``"direction"`` is the paper's: see :class:`~lightning_uq.callbacks.coordinates.FeatureCoordinates`.
        held_out: For two kinds of coordinates, rows that the network was not trained on; by default the one validation loader.
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

    def __init__(
        self,
        *,
        k: int = 50,
        max_rows: int | None = MAX_FEATURES,
        feature_transform: FeatureTransform = "direction",
        held_out: Any = None,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows
        check_integer("k", k, 1)
        self.k = k
        self.coordinates = FeatureCoordinates(feature_transform, held_out)
        self._rows: Tensor | None = None
        self._banks: Banks = {}
        self._tails: dict[FeatureTransform, TailFit] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on: ``k`` only where the tail of its distances is a part of it."""
        of_tails = {"k": self.k} if len(self.coordinates.names) > 1 else {}
        return {**super().settings, "feature_transform": self.coordinates.transform, **of_tails}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for held-out rows before the training."""
        self.coordinates.check(self, pl_module, trainer)
        super().on_fit_start(trainer, pl_module)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """All rows' features [M, N, D], and the tails of two scores."""
        features = self.gather_features(model, loader, trainer, self.max_rows)
        if features.shape[1] < self.k:
            warnings.warn(
                f"FitKNN was fitted to {features.shape[1]} rows, fewer than k={self.k}: the distance to the farthest is the "
                "score.",
                stacklevel=2,
            )
        banks = self._make_banks(features)
        tails = self.coordinates.tails(self, model, trainer, lambda rows, name: self._distances(rows, name, banks))
        found = {f"{name}.{key}": value for name, tail in tails.items() for key, value in tail._asdict().items()}
        return {"feature_layer": self.features.resolved, "features": features, **found}

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Take the rows."""
        super().restore_tensors(tensors)
        self._rows = None if tensors is None else tensors["features"]
        self._banks, self._tails = {}, {}
        for name in self.coordinates.names:
            if tensors is not None and f"{name}.knots" in tensors:
                self._tails[name] = TailFit(*(tensors[f"{name}.{field}"] for field in TailFit._fields))

    def feature_scores(self, features: Tensor) -> Tensor:
        """The distance [B] to the ``k``-th nearest row, for features [M, B, D]; the mean over members."""
        if self._rows is None:
            raise NotFittedError("FitKNN is not fitted: train with it, or call `fit(model, loader)`.")
        if self._rows.device != features.device or not self._banks:
            self._rows = self._rows.to(features.device)
            self._banks = self._make_banks(self._rows)
        scores = []
        for name in self._tails or self.coordinates.names[-1:]:
            distance = self._distances(features, name, self._banks)
            if name in self._tails:
                self._tails[name] = TailFit(*(tensor.to(distance.device) for tensor in self._tails[name]))
                distance = tail_score(distance, self._tails[name])
            scores.append(distance)
        return torch.stack(scores).amax(0).to(wide_dtype(features.device)).to(features.device)

    def _make_banks(self, features: Tensor) -> Banks:
        """The bank of each member's rows [M, N, D], in each of the coordinates."""
        return {
            name: [neighbor_bank(transform_features(rows, name), normalize=False) for rows in features]
            for name in self.coordinates.names
        }

    def _distances(self, features: Tensor, coordinates: FeatureTransform, banks: Banks) -> Tensor:
        """The mean over members of the distance [B] to the ``k``-th nearest row, of features [M, B, D]."""
        rows, members = transform_features(features, coordinates), banks[coordinates]
        k = min(self.k, len(members[0].rows))
        return torch.stack([neighbor_distance(one, bank, k) for one, bank in zip(rows, members, strict=True)]).mean(0)
