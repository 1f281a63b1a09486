"""Student's t with a location and a scale: what a normal-inverse-gamma predicts. Elementwise, in float64."""

import math

import numpy as np
import torch
from torch import Tensor

from lightning_uq.functional._validation import to_sum_dtype

_NODES, _WEIGHTS = (
    torch.from_numpy((values + shift) / 2)
    for values, shift in zip(np.polynomial.legendre.leggauss(64), (1, 0), strict=True)
)
"""Gauss-Legendre nodes and weights on [0, 1]."""


def student_t_log_prob(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a Student-t with ``df`` degrees of freedom, elementwise.

    Example:
        >>> student_t_log_prob(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1)).exp()  # Cauchy: 1 / pi
        tensor([0.3183], dtype=torch.float64)
    """
    value, df, location, scale = (to_sum_dtype(x) for x in (value, df, location, scale))
    z = (value - location) / scale
    return -0.5 * (df + 1) * torch.log1p(z.square() / df) - scale.log() - 0.5 * df.log() - _log_beta(df)


def student_t_cdf(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """P(Y <= value), elementwise, for ``df`` >= 1.

    With t = sqrt(df) tan(u) the density is proportional to cos(u)^(df - 1), which 64 Gauss-Legendre nodes integrate to about
    1e-8 at df = 2 and to rounding above df = 5.

    Example:
        >>> student_t_cdf(torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1))  # Cauchy: 3 / 4
        tensor([0.7500], dtype=torch.float64)
    """
    value, df, location, scale = (to_sum_dtype(x) for x in (value, df, location, scale))
    return _cdf_of_angle(torch.atan((value - location) / (scale * df.sqrt())), df)


def student_t_quantile(level: float, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """The value y with P(Y <= y) = level, elementwise, by bisection of the angle; ``level`` in (0, 1), ``df`` >= 1.

    Example:
        >>> student_t_quantile(0.75, torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor([1.0000], dtype=torch.float64)
    """
    df, location, scale = (to_sum_dtype(x) for x in (df, location, scale))
    low, high = torch.full_like(df, -math.pi / 2), torch.full_like(df, math.pi / 2)
    for _ in range(54):
        middle = (low + high) / 2
        below = _cdf_of_angle(middle, df) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return location + scale * df.sqrt() * torch.tan((low + high) / 2)


def student_t_crps(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Continuous ranked probability score, elementwise, in the value's units, for ``df`` > 1; lower is better.

    scale (z (2 F(z) - 1) + 2 f(z) (df + z^2) / (df - 1) - 2 sqrt(df) / (df - 1) B(1/2, df - 1/2) / B(1/2, df/2)^2).

    Source: Jordan et al., Journal of Statistical Software 90 (2019), appendix A.

    Example:
        >>> student_t_crps(torch.zeros(1), torch.tensor([1e6]), torch.zeros(1), torch.ones(1))  # a Gaussian's 0.2337
        tensor([0.2337], dtype=torch.float64)
    """
    value, df, location, scale = (to_sum_dtype(x) for x in (value, df, location, scale))
    z = (value - location) / scale
    zero, one = torch.zeros_like(df), torch.ones_like(df)
    density = student_t_log_prob(z, df, zero, one).exp()
    spread = torch.exp(_log_beta(2 * df - 1) - 2 * _log_beta(df)) * df.sqrt()
    inside = z * (2 * student_t_cdf(z, df, zero, one) - 1)
    return scale * (inside + 2 * (density * (df + z.square()) - spread) / (df - 1))


def _log_beta(df: Tensor) -> Tensor:
    """log B(1/2, df / 2); its two log-gammas cancel where df is large, so there it is a series in 1 / df."""
    half = df / 2
    series = 0.5 * half.log() - 1 / (8 * half) + 1 / (192 * half**3)
    ratio = torch.where(df > 1000, series, torch.lgamma(half + 0.5) - torch.lgamma(half))
    return 0.5 * math.log(math.pi) - ratio


def _cdf_of_angle(angle: Tensor, df: Tensor) -> Tensor:
    # Beyond 12 standard deviations nothing is left of the integrand, which the nodes would miss from afar.
    end = torch.minimum(angle.abs(), 12 / df.sqrt())
    nodes, weights = _NODES.to(end), _WEIGHTS.to(end)
    log_cosine = torch.log(torch.cos(end.unsqueeze(-1) * nodes))
    mass = end * (weights * torch.exp((df - 1).unsqueeze(-1) * log_cosine)).sum(-1) / _log_beta(df).exp()
    return 0.5 + 0.5 * torch.sign(angle) * (2 * mass).clamp_max(1)
