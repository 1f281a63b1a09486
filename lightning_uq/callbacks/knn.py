"""Distance to the nearest training features, as an out-of-distribution score of any trained network."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_uq.callbacks.coordinates import FeatureCoordinates
from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.functional.feature_transforms import FeatureTransform
from lightning_uq.functional.validation import check_integer
from lightning_uq.method import Method, Setting
from lightning_uq.networks.feature_neighbors import FeatureNeighbors
from lightning_uq.networks.feature_score import tails_to_tensors
from lightning_uq.running.row_sample import RowSample

K = 50
"""The paper's k for CIFAR-10, with which rows of the comparison are fitted."""


class FitKNN(FeatureCallback):
    """Deep nearest neighbours after training: the distance of an input's features to the ``k``-th nearest training row's.

    Features are scaled to length 1, unless ``feature_transform`` says otherwise. Those of at most ``max_rows`` training rows are kept, N x D numbers, in the ``-uq.ckpt`` (the
    paper finds 1 % of ImageNet to do), and in memory and in exported graphs in float64. With ``pool="positions"`` each position of a map is a row.

    The predictions of this package's modules then carry the distance as ``ood_score``; with :class:`OODDetection` the score ``knn`` is among those
    logged; :meth:`score` gives it for any loader. An ensemble's is the mean of its members'. Labels are not looked at, but for the
    ``ignore_index`` of a segmentation.

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
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        >>> knn = FitKNN(k=1).fit(network, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        >>> knn.score(network, [torch.tensor([[5.0, 0.0], [-1.0, 0.0]])])  # the nearest to the second is a right angle off
        tensor([0.0000, 1.4142], dtype=torch.float64)
    """

    score_name = "knn"

    def __init__(
        self,
        *,
        k: int = K,
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

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on; ``k`` is a part of it because a file's score is that of its own ``k``."""
        return {**super().settings, "feature_transform": self.coordinates.transform, "k": self.k}

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
        names = self.coordinates.names
        tails = self.coordinates.tails(self, model, trainer, FeatureNeighbors(features, names, self.k).distance)
        return {
            "feature_layer": self.features.resolved,
            "neighbors": features,
            "coordinates": list(tails or names[-1:]),
            "k": self.k,
            **tails_to_tensors(tails),
        }

    def make_scorer(self, tensors: dict[str, Any]) -> FeatureNeighbors:
        """The rows, as they are searched."""
        return FeatureNeighbors.from_tensors(tensors)


def _fit(setting: Setting) -> list[Callback]:
    return [FitKNN()]


def _method(network: str, task: str) -> Method:
    return Method(
        name="knn",
        about=f"the {network} network; distance of features to the {K}th nearest training input",
        trained_as=network,
        callbacks=_fit,
        ood_score="knn",
        tasks=(task,),
        link="https://arxiv.org/abs/2204.06507",
        detects_only=True,
    )


METHODS = (_method("softmax", "classification"), _method("gaussian", "regression"))
