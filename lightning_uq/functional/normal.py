"""Log-densities of Gaussians, computed by one formula."""

import math

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen

LOG_2PI = math.log(2 * math.pi)


def log_density(squared_distance: Tensor, log_det: Tensor | float, dims: int = 1) -> Tensor:
    """-1/2 (d^2 + log |Sigma| + D log 2 pi), the log-density at a squared Mahalanobis distance.

    Args:
        squared_distance: d^2 = (y - mu)^T Sigma^-1 (y - mu), of any shape.
        log_det: log |Sigma|, which broadcasts to ``squared_distance``; the log-variance in one dimension.
        dims: D; 0 omits the constant.

    Example:
        >>> log_density(torch.tensor([0.0, 4.0]), 0.0)
        tensor([-0.9189, -2.9189])
    """
    return -0.5 * (squared_distance + log_det + dims * LOG_2PI)


def gaussian_log_likelihood(error: Tensor, covariance: Tensor) -> Tensor:
    """Log-density of errors under N(0, covariance).

    Args:
        error: [..., tau].
        covariance: [tau, tau] or [..., tau, tau], positive definite.

    Returns:
        [...], in float64.

    Example:
        >>> gaussian_log_likelihood(torch.zeros(1), torch.eye(1))
        tensor(-0.9189, dtype=torch.float64)
    """
    error, covariance = widen(error), widen(covariance)
    factor = torch.linalg.cholesky(covariance)
    factor = factor.expand(*error.shape[:-1], *factor.shape[-2:])
    white = torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False).squeeze(-1)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return log_density(white.square().sum(-1), 2 * half_log_det, error.shape[-1])
