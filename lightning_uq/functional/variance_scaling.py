"""A single factor on a predicted variance, fitted on held-out rows.

Every fit treats the D target dimensions separately, since each has its own units and its own error. NaN marks missing targets. In float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import to_float64

_STEP = 0.25
"""Distance between the candidates of log s; the best one is refined."""
_LOWEST = -60.0
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_stretch(
    residual: Tensor,
    offset: Tensor,
    scale: Tensor,
    log_weight: Tensor,
    degrees_of_freedom: Tensor | None = None,
) -> Tensor:
    """The factor s^2 [D] that maximises the likelihood of mixtures stretched by s about their means.

    With the residual u = y - mean, a component's offset o = location - mean and its scale c, the stretched density is
    sum_m w_m p_m((u / s - o_m) / c_m) / (c_m s). For one Gaussian, s^2 is the mean of u^2 / c^2. Other likelihoods may have several
    maxima; the result is never worse than s = 1.

    Args:
        residual: Target minus the predicted mean [N, ..., D].
        offset: Locations of the components minus the mean [N, M, ..., D].
        scale: Scales of the components [N, M, ..., D].
        log_weight: Logarithms of the components' weights [N, M, ..., D].
        degrees_of_freedom: Degrees of freedom of Student-t components [N, M, ..., D], above 2; None for Gaussians.

    Raises:
        InputError: A target is never known, or all of its residuals are 0.

    Source: Laves et al., MIDL 2020 (arXiv 2006.13092), for one Gaussian.

    Example:
        >>> one = torch.ones(2, 1, 1)
        >>> fit_stretch(torch.tensor([[2.0], [4.0]]), 0 * one, one, 0 * one)
        tensor([10.], dtype=torch.float64)
    """
    found = []
    parts = [part for part in (offset, scale, log_weight, degrees_of_freedom) if part is not None]
    for u, *each in _targets(residual, *parts):
        components = Components(*(part.T for part in each))
        squared = components.scale.square()
        if components.degrees_of_freedom is not None:
            squared = squared * components.degrees_of_freedom / (components.degrees_of_freedom - 2)
        weight = components.log_weight.exp()
        variance = torch.where(weight > 0, weight * (squared + components.location.square()), 0.0).sum(0)
        start = (u.square() / variance).mean()
        if len(components.location) == 1 and degrees_of_freedom is None:
            found.append(start)
            continue

        def nll(log_s: float, u: Tensor = u, components: Components = components) -> float:
            return log_s - float(components.log_density(u * math.exp(-log_s)).mean())

        found.append(start.new_tensor(math.exp(2 * _minimum(nll, 0.5 * math.log(start), candidate=0.0))))
    return torch.stack(found)


def fit_residual_variance(errors: Tensor) -> Tensor:
    """The variance v [D] that maximises the likelihood of an equal-weight mixture of Gaussians N(mean_z, v).

    For one hypothesis it is the mean squared error.

    Args:
        errors: Target minus the mean of each hypothesis [N, Z, ..., D].

    Raises:
        InputError: A target is never known, or all of its errors are 0.

    Example:
        >>> fit_residual_variance(torch.tensor([[[1.0]], [[3.0]]]))
        tensor([5.], dtype=torch.float64)
    """
    found = []
    for _, own in _targets(errors.abs().amax(1), errors):
        squared = own.square()
        start = squared.mean()
        if squared.shape[1] == 1:
            found.append(start)
            continue

        def nll(log_s: float, squared: Tensor = squared) -> float:
            return log_s - float(torch.logsumexp(-0.5 * squared * math.exp(-2 * log_s), 1).mean())

        found.append(start.new_tensor(math.exp(2 * _minimum(nll, 0.5 * math.log(start)))))
    return torch.stack(found)


def fit_quantile_stretch(residual: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
    """The factor s^2 [D], where s minimises the pinball loss of quantiles whose distances from the median are multiplied by s.

    The loss is convex and piecewise linear in s, so the exact minimum is found among the ratios of residuals and offsets.

    Args:
        residual: Target minus the predicted median [N, ..., D].
        offset: Quantiles minus the median [N, Q, ..., D].
        levels: Levels of the quantiles [N, Q, ..., D].

    Raises:
        InputError: A target is never known, all of its quantiles equal its median, or the best s is 0.

    Example:
        >>> offset = torch.tensor([-1.0, 1.0]).expand(3, 2)[..., None]
        >>> levels = torch.tensor([0.1, 0.9]).expand(3, 2)[..., None]
        >>> fit_quantile_stretch(torch.tensor([[-2.0], [0.0], [2.0]]), offset, levels)
        tensor([4.], dtype=torch.float64)
    """
    found = []
    for u, o, tau in _targets(residual, offset, levels):
        slope = torch.where(o > 0, -o * tau, o * (1 - tau)).sum()  # of the loss, left of all kinks
        kinks, order = (u.unsqueeze(1) / o)[o != 0].sort()
        if not len(kinks):
            raise InputError(
                "`prediction` must have quantiles that differ from its median, but for a target it has none."
            )
        slopes = slope + o[o != 0].abs()[order].cumsum(0)
        s = kinks[(slopes >= -1e-12 * slope.abs()).nonzero()[0, 0]]
        if s <= 0:
            raise InputError(
                "The quantiles of a target have their lowest pinball loss at a spread of 0, so no factor fits. Use more held-out rows."
            )
        found.append(s.square())
    return torch.stack(found)


_EXACT = (
    "`target` must differ from the point predictions, but for one target dimension they are equal, so no spread fits. "
    "Use rows on which the network was not trained."
)


def _targets(residual: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each target, its known residuals [n] and the corresponding parts [n, M]."""
    for d in range(residual.shape[-1]):
        u = to_float64(residual[..., d]).flatten()
        known = ~u.isnan()
        if not bool(known.any()):
            raise InputError("`target` must hold a known number for each target dimension, but all are NaN for one.")
        u = u[known]
        if not bool(u.any()):
            raise InputError(_EXACT)
        yield u, *(to_float64(part[..., d]).movedim(1, -1).flatten(0, -2)[known] for part in parts)


def _minimum(function: Callable[[float], float], start: float, candidate: float | None = None) -> float:
    """The minimum of a function of log s: the best of a grid around ``start`` and a candidate, refined by golden-section search."""
    low, high = start - 24 * _STEP, start + 8 * _STEP
    values = {low + i * _STEP: function(low + i * _STEP) for i in range(33)}
    while min(values, key=values.__getitem__) == low:
        if low < start + _LOWEST:
            raise InputError(_EXACT)
        low -= _STEP
        values[low] = function(low)
    while min(values, key=values.__getitem__) == high:
        high += _STEP
        values[high] = function(high)
    if candidate is not None:
        values[candidate] = function(candidate)
    best = min(values, key=values.__getitem__)
    left, right = best - _STEP, best + _STEP
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    value_a, value_b = function(a), function(b)
    while right - left > 1e-8:
        if value_a <= value_b:
            right, b, value_b = b, a, value_a
            a = right - _GOLDEN * (right - left)
            value_a = function(a)
        else:
            left, a, value_a = a, b, value_b
            b = left + _GOLDEN * (right - left)
            value_b = function(b)
    refined = a if value_a <= value_b else b
    return refined if function(refined) <= values[best] else best
