"""The length and the direction of a feature, jointly or separately."""

from typing import Literal

import torch
from torch import Tensor

from lightning_uq.functional.ood_features import unit_rows
from lightning_uq.functional.precision import widen

FeatureTransform = Literal["auto", "raw", "polar", "direction", "combined"]
FEATURE_TRANSFORMS: tuple[FeatureTransform, ...] = ("auto", "raw", "polar", "direction", "combined")


def coordinates_of(transform: FeatureTransform) -> tuple[FeatureTransform, ...]:
    """The coordinates in which features are fitted: two for ``"combined"`` and ``"auto"``, otherwise one."""
    return ("raw", "polar") if transform in ("auto", "combined") else (transform,)


def transform_features(features: Tensor, coordinates: FeatureTransform) -> Tensor:
    """Convert features f to other coordinates: ``"raw"``: f; ``"direction"``: f / |f|; ``"polar"``: f / |f| and log(1 + |f|).

    A zero vector has direction 0. log(1 + |f|) keeps a few zero vectors (from ReLUs) from dominating the scale of all lengths, as log 0
    would. A vector whose length overflows becomes NaN.

    Args:
        features: [..., D].
        coordinates: Name of the coordinates.

    Returns:
        [..., D], or [..., D + 1] for "polar"; in float64 if the device supports it, except for "raw".

    Example:
        >>> transform_features(torch.tensor([[3.0, 4.0]]), "polar").round(decimals=4)
        tensor([[0.6000, 0.8000, 1.7918]], dtype=torch.float64)
    """
    if coordinates == "raw":
        return features
    overflows = ~torch.linalg.vector_norm(features, dim=-1, keepdim=True).isfinite()  # in the features' own precision
    features = widen(features).masked_fill(overflows, torch.nan)
    direction = unit_rows(features)
    if coordinates == "direction":
        return direction
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return torch.cat([direction, length.log1p()], -1)
