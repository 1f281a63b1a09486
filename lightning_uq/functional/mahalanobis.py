"""Squared Mahalanobis distances, from which every score of a Gaussian density is computed."""

import torch
from torch import Tensor

from lightning_uq.functional.precision import wide_dtype, widen


def squared_distances(features: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Squared Mahalanobis distances |A_c (f - mu_c)|^2, with one matrix product per class.

    Args:
        features: [N, D].
        mean: [C, D].
        whitening: A, as in :class:`GaussianFit`: [C, D, D], [1, D, D] or [C, D].

    Returns:
        [N, C] in float64; products use the common dtype of ``features``, ``mean`` and ``whitening``.

    Example:
        >>> squared_distances(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]))
        tensor([[2.2500]], dtype=torch.float64)
    """
    if whitening.ndim == 3 and len(whitening) == 1 < len(mean) and wide_dtype(features.device) == torch.float64:
        # One product for all classes. Float64, if the device has it, limits the cancellation in the expanded square.
        points, centers = widen(features @ whitening[0].T), widen(mean @ whitening[0].T)
        squares = points.square().sum(1, keepdim=True) + centers.square().sum(1)
        return (squares - 2 * points @ centers.T).clamp_min(0)
    columns = []
    for center, matrix in zip(mean, whitening.expand(len(mean), *whitening.shape[1:]), strict=True):
        offset = features - center  # subtracted before the product, because an expanded square would cancel
        white = offset * matrix if matrix.ndim == 1 else offset @ matrix.T
        columns.append(widen(white.square().sum(1)))
    return torch.stack(columns, 1)
