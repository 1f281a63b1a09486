"""The transform that adds a score of the input's features to predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_uq.networks.feature_score import FeatureScore
from lightning_uq.networks.pooling import Pool
from lightning_uq.networks.positions import resized
from lightning_uq.predictions import Prediction
from lightning_uq.running.features import LayerFeatures
from lightning_uq.running.transforms import Change, PredictionTransform


class DensityTransform(PredictionTransform):
    """Adds the ``ood_score`` of an input's features to its prediction and, for a density, the ``log_density``.

    Args:
        layer: Name of the layer whose input holds the features.
        score: The fitted score.
        pool: How the layer's input is pooled.
    """

    kind = "density"

    def __init__(self, layer: str, score: FeatureScore, pool: Pool | None = None) -> None:
        self.features = LayerFeatures(layer, pool)
        self.score = score

    @contextmanager
    def observing(self, module: nn.Module) -> Iterator[Change]:
        """Record the features of the forward pass."""
        with self.features.recording(module) as features:
            yield lambda prediction: with_score(self.score, prediction, features())


def with_score(score: FeatureScore, prediction: Prediction, features: Tensor) -> Prediction:
    """The prediction with the score of its features [M, B, D]."""
    results = score.to(features.device).results(features)
    carried = {name: _on_grid(values, prediction.map_shape) for name, values in results.items()}
    if not torch.compiler.is_compiling():
        carried["score_summary"] = score.summary
    return prediction.replace(**carried)


def _on_grid(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values [B], or values [B, *P] at positions of features, on the prediction's grid."""
    return values if values.ndim == 1 else resized(values, shape)
