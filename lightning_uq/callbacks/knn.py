"""Distance to the nearest training features as an out-of-distribution score, for any trained network."""

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
"""The paper's k for CIFAR-10, which the comparison uses."""


class FitKNN(FeatureCallback):
    """Deep nearest neighbors after training: the distance of an input's features to those of the ``k``-th nearest training row.

    Features are scaled to length 1, unless ``feature_transform`` says otherwise. The features of at most ``max_rows`` training rows, N x D numbers, are stored in the ``-uq.ckpt``, and
    in float64 in memory and in exported graphs. (The paper finds that 1 % of ImageNet suffices.) With ``pool="positions"``, each position of a map is a row.

    The predictions of this package's modules then carry the distance as ``ood_score``. :class:`OODDetection` logs it as ``knn``, and
    :meth:`score` returns it for any loader. The distance of an ensemble is the mean over its members. Labels are not used, except the
    ``ignore_index`` of a segmentation.

    Args:
        k: The rank of the neighbor. The paper uses 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet.
        max_rows: The largest number of training rows to keep. If there are more, a random sample is kept, the same on any number
            of ranks. None keeps all.
        feature_transform: ``"direction"`` is the paper's: see :class:`~lightning_uq.callbacks.coordinates.FeatureCoordinates`.
        held_out: Rows that the network was not trained on, for "combined" coordinates; by default the only validation loader.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name`` and
            others.

    Raises:
        InputError: The features hold NaN, or there are no fitting data.

    Warns:
        UserWarning: There are fewer than ``k`` rows; the distance to the farthest row is then the score.

    Source: Sun et al., ICML 2022 (arXiv 2204.06507).

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        >>> knn = FitKNN(k=1).fit(network, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        >>> knn.score(network, [torch.tensor([[5.0, 0.0], [-1.0, 0.0]])])  # the nearest to the second is a right angle off
        tensor([0.0000, 1.4142], dtype=torch.float64)
    """

    score_name = "knn"
    can_continue = True

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
        """The arguments that a fit depends on. ``k`` is one of them, since a file stores the score of one ``k``."""
        return {**super().settings, "feature_transform": self.coordinates.transform, "k": self.k}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for held-out rows before the training."""
        super().on_fit_start(trainer, pl_module)
        self.coordinates.check(self, pl_module, trainer)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """The features [M, N, D] of all rows, and the tails of two scores."""
        features = self.gather_features(model, loader, trainer, self.max_rows)
        if features.shape[1] < self.k:
            warnings.warn(
                f"FitKNN was fitted to {features.shape[1]} rows, fewer than k={self.k}, so the distance to the farthest row is the "
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
        """The module that searches the kept rows."""
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
