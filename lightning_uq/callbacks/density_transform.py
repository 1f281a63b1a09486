"""Predictions that carry the density of their input's features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_uq.networks.feature_density import FeatureDensity
from lightning_uq.networks.pooling import Pool
from lightning_uq.networks.positions import resized, score_positions
from lightning_uq.predictions import Prediction
from lightning_uq.running.features import LayerFeatures
from lightning_uq.running.transforms import Change, PredictionTransform


class DensityTransform(PredictionTransform):
    """Adds ``log_density`` and ``ood_score`` of an input's features to its prediction.

    Args:
        layer: Name of the layer whose input holds the features.
        density: The fitted density.
        pool: How the input is pooled.
    """

    kind = "density"

    def __init__(self, layer: str, density: FeatureDensity, pool: Pool | None = None) -> None:
        self.features = LayerFeatures(layer, pool)
        self.density = density

    @contextmanager
    def observing(self, module: nn.Module) -> Iterator[Change]:
        """Records the features of the forward pass."""
        with self.features.recording(module) as features:
            yield lambda prediction: added_density(self.density, prediction, features())


def added_density(density: FeatureDensity, prediction: Prediction, features: Tensor) -> Prediction:
    """The prediction of inputs with features [M, B, D] with their log-density and score."""
    density = density.to(features.device)
    log_density = score_positions(density.log_density, features)
    score = -log_density if density.is_log_density else score_positions(density, features)
    shape = prediction.map_shape
    return prediction.replace(log_density=_on_grid(log_density, shape), ood_score=_on_grid(score, shape))


def _on_grid(values: Tensor, shape: Sequence[int]) -> Tensor:
    """[B], or [B, *P] of features at positions, on the prediction's grid."""
    return values if values.ndim == 1 else resized(values, shape)
