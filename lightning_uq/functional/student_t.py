"""Student's t distribution with a location and a scale, the prediction of a normal-inverse-gamma. In float64.

Functions of one distribution are elementwise; functions of an equal-weight mixture take parameters [Z, ...].
"""

import math

import numpy as np
import torch
from torch import Tensor

from lightning_uq.functional.precision import widen

_NODES, _WEIGHTS = (
    torch.from_numpy((values + shift) / 2)
    for values, shift in zip(np.polynomial.legendre.leggauss(64), (1, 0), strict=True)
)
"""Gauss-Legendre nodes and weights on [0, 1]."""

_STEPS = torch.tensor([1.0, 3.0, 5.0, 10.0, 30.0, 90.0, 540.0, 5000.0], dtype=torch.float64)
"""Ends of the panels of a mixture's integral, in scales from each component's location."""
_MAX_PANELS = 511
"""Number of panels for 32 components; for more components, panels are thinned out."""
_ELEMENTS = 2**21
"""Approximate number of values that such an integral holds in memory at a time."""


def _panel(num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [-1, 1], and the matrix from values there to integrals from -1 to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    coefficients = np.linalg.inv(np.polynomial.legendre.legvander(nodes, num_nodes - 1))
    integrals = np.polynomial.legendre.legval(nodes, np.polynomial.legendre.legint(coefficients, lbnd=-1)).T
    return torch.from_numpy(nodes), torch.from_numpy(weights), torch.from_numpy(integrals.copy())


_PANEL_NODES, _PANEL_WEIGHTS, _PANEL_INTEGRALS = _panel(12)


def student_t_log_prob(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a Student-t with ``df`` degrees of freedom, elementwise.

    Example:
        >>> student_t_log_prob(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1)).exp()  # Cauchy: 1 / pi
        tensor([0.3183], dtype=torch.float64)
    """
    value, df, location, scale = (widen(x) for x in (value, df, location, scale))
    z = (value - location) / scale
    return -0.5 * (df + 1) * torch.log1p(z.square() / df) - scale.log() - 0.5 * df.log() - _log_beta(df)


def student_t_cdf(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """P(Y <= value), elementwise, for ``df`` >= 1.

    With t = sqrt(df) tan(u), the density is proportional to cos(u)^(df - 1). 64 Gauss-Legendre nodes integrate it with an error of about
    1e-8 at df = 2, and up to rounding above df = 5.

    Example:
        >>> student_t_cdf(torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1))  # Cauchy: 3 / 4
        tensor([0.7500], dtype=torch.float64)
    """
    value, df, location, scale = (widen(x) for x in (value, df, location, scale))
    return _cdf_of_angle(torch.atan((value - location) / (scale * df.sqrt())), df)


def student_t_quantile(level: float | Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """The value y with P(Y <= y) = level, elementwise, by bisection of the angle; ``level`` in (0, 1), ``df`` >= 1.

    Example:
        >>> student_t_quantile(0.75, torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor([1.0000], dtype=torch.float64)
    """
    df, location, scale = (widen(x) for x in (df, location, scale))
    high = _largest_angle(df)
    low = -high
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
    df, location, scale = (widen(x) for x in (df, location, scale))
    half_distance = 2 * torch.exp(_log_beta(2 * df - 1) - 2 * _log_beta(df)) * df.sqrt() / (df - 1)
    return student_t_mean_absolute(value, df, location, scale) - scale * half_distance


def student_t_mean_absolute(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """E|Y - value|, elementwise, in the value's units, for ``df`` > 1.

    scale (z (2 F(z) - 1) + 2 f(z) (df + z^2) / (df - 1)) with z = (value - location) / scale.

    Example:
        >>> student_t_mean_absolute(torch.zeros(1), torch.full((1,), 1e6), torch.zeros(1), torch.ones(1))  # sqrt(2 / pi)
        tensor([0.7979], dtype=torch.float64)
    """
    value, df, location, scale = (widen(x) for x in (value, df, location, scale))
    z = (value - location) / scale
    zero, one = torch.zeros_like(df), torch.ones_like(df)
    density = student_t_log_prob(z, df, zero, one).exp()
    inside = z * (2 * student_t_cdf(z, df, zero, one) - 1)
    return scale * (inside + 2 * density * (df + z.square()) / (df - 1))


def student_t_mixture_quantile(level: float | Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """The value y [...] with mean_z P(Y_z <= y) = ``level``, by bisection between the components' quantiles.

    Args:
        level: Probability in (0, 1), a number or a tensor that broadcasts to [...].
        df: Degrees of freedom [Z, ...], at least 1.
        location: [Z, ...].
        scale: [Z, ...].

    Example:
        >>> one = torch.ones(2, 1)
        >>> student_t_mixture_quantile(0.5, 3 * one, torch.tensor([[-1.0], [3.0]]), one)
        tensor([1.0000], dtype=torch.float64)
    """
    components = student_t_quantile(level, df, location, scale)
    low, high = components.amin(0), components.amax(0)
    if len(components) == 1:
        return low
    for _ in range(64):
        middle = low + (high - low) / 2
        below = student_t_cdf(middle, df, location, scale).mean(0) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low + (high - low) / 2


def student_t_mixture_crps(value: Tensor, df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Continuous ranked probability score [...] of an equal-weight mixture, in the value's units; lower is better.

    With the mixture's distribution function F, it is mean_z E|Y_z - y| - integral of F (1 - F). One component has a closed form. For
    several, the integral is numerical: for ``df`` > 2 the score's relative error is below 1e-6 with up to 32 components, and with more
    components if their scales are within a factor of 10.

    Args:
        value: y [...].
        df: Degrees of freedom [Z, ...], above 1.
        location: [Z, ...].
        scale: [Z, ...].

    Example:
        >>> same = torch.zeros(2, 1)
        >>> student_t_mixture_crps(torch.zeros(1), same + 1e6, same, same + 1)  # a Gaussian's 0.2337
        tensor([0.2337], dtype=torch.float64)
    """
    if len(df) == 1:
        return student_t_crps(value, df, location, scale)[0]
    value, df, location, scale = (widen(x) for x in (value, df, location, scale))
    to_value = student_t_mean_absolute(value, df, location, scale).mean(0)
    num_panels = min(_MAX_PANELS, 2 * len(_STEPS) * len(df) - 1)
    size = max(1, _ELEMENTS // (num_panels * len(_PANEL_NODES)))
    parts = torch.stack([df, location, scale]).flatten(2).split(size, 2)  # type: ignore[no-untyped-call]
    spread = torch.cat([_mean_half_distance(*part) for part in parts])
    return to_value - spread.reshape(to_value.shape)


def _mean_half_distance(df: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """E|Y - Y'| / 2 for two draws from a mixture, which is the integral of F (1 - F): [N] from parameters [Z, N].

    Panels end at fixed numbers of scales from each component. Inside, F and 1 - F are integrals of the polynomial through the density
    values. Beyond the last end, the tails are power functions with known integrals.
    """
    steps = torch.cat([-_STEPS, _STEPS]).to(location)
    ends = (location + steps[:, None, None] * scale).flatten(0, 1).sort(0).values
    if len(ends) > _MAX_PANELS + 1:
        ends = ends[torch.linspace(0, len(ends) - 1, _MAX_PANELS + 1, device=ends.device).round().long()]
    half = ends.diff(dim=0).unsqueeze(1) / 2
    x, weights, cumulative = (table.to(ends) for table in (_PANEL_NODES, _PANEL_WEIGHTS, _PANEL_INTEGRALS))
    nodes = ends[:-1].unsqueeze(1) + half * (1 + x.unsqueeze(1))  # [P, nodes, N]
    density = torch.zeros_like(nodes)
    for parameters in zip(df, location, scale, strict=True):
        density = density + student_t_log_prob(nodes, *parameters).exp() / len(df)
    from_left = half * (cumulative @ density)
    mass = half * (weights @ density).unsqueeze(1)
    # Beyond both ends, [2, Z, N]: the probability, and the integral of the smaller of F and 1 - F.
    distance = (ends[[0, -1]].unsqueeze(1) - location).abs()
    tail = distance / df * student_t_log_prob(ends[[0, -1]].unsqueeze(1), df, location, scale).exp()
    below, above = tail.mean(1)
    outside = (tail * distance / (df - 1)).mean(1).sum(0)
    # F and 1 - F are each summed from the end at which they are small.
    lower = below + mass.cumsum(0) - mass + from_left
    upper = above + mass.flip(0).cumsum(0).flip(0) - from_left
    total: Tensor = outside + (half * (weights @ (lower * upper)).unsqueeze(1)).sum((0, 1))
    return total


def _log_beta(df: Tensor) -> Tensor:
    """log B(1/2, df / 2). For large df, where its two log-gammas cancel, it is a series in 1 / df."""
    half = df / 2
    series = 0.5 * half.log() - 1 / (8 * half) + 1 / (192 * half**3)
    ratio = torch.where(df > 1000, series, torch.lgamma(half + 0.5) - torch.lgamma(half))
    return 0.5 * math.log(math.pi) - ratio


def _cdf_of_angle(angle: Tensor, df: Tensor) -> Tensor:
    end = torch.minimum(angle.abs(), _largest_angle(df))
    nodes, weights = _NODES.to(end), _WEIGHTS.to(end)
    # The log of the cosine, because for a small angle the cosine itself rounds to 1.
    log_cosine = -0.5 * torch.log1p(torch.tan(end.unsqueeze(-1) * nodes).square())
    mass = end * (weights * torch.exp((df - 1).unsqueeze(-1) * log_cosine)).sum(-1) / _log_beta(df).exp()
    return 0.5 + 0.5 * torch.sign(angle) * (2 * mass).clamp_max(1)


def _largest_angle(df: Tensor) -> Tensor:
    """The angle beyond which the integrand is negligible (12 standard deviations); otherwise the nodes could miss the peak."""
    return (12 / df.sqrt()).clamp_max(math.pi / 2)
