"""Recalibration of predicted distributions: one monotone map per target, from predicted probabilities to frequencies among held-out rows.

Knots are [2, D, K]: predicted probabilities u and calibrated probabilities v, both increasing from 0 to 1 along K. The map is linear
between knots, so a calibrated density is the predicted one times the slope, which is positive and finite.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import to_float64, widen

LEAST = 1e-9
"""Probabilities are clipped to this distance from 0 and 1, because closer ones are dominated by rounding of 1 - u."""
MIN_ROWS = 10
"""Minimum number of rows between two knots."""


def fit_recalibration(integral: Tensor) -> Tensor:
    """Fit each target's map from predicted probabilities to frequencies.

    The isotonic regression on u of the empirical frequency of {P(Y <= y) <= u} is the empirical distribution function itself, which jumps
    at each row. Here it is evaluated at a few knots: at about N^(1/3) equal steps of the frequency, and at the frequencies 1/2, 1/4, 1/8 and so
    on, towards 0 and likewise towards 1, as long as ten rows lie between two knots. Equal probabilities share a knot in the middle of their
    step. With fewer than twenty rows, the map is the identity.

    Args:
        integral: Probability integrals P(Y <= y) [N, ..., D] of held-out targets; NaN marks missing targets.

    Returns:
        Knots [2, D, K] in float64; a target with fewer knots than K repeats its last one.

    Raises:
        InputError: One of the targets is never known.

    Source: Kuleshov, Fenner & Ermon, ICML 2018 (arXiv 1807.00263).

    Example:
        >>> fit_recalibration(torch.linspace(0.005, 0.495, 50)[:, None])[:, 0].T.round(decimals=2)
        tensor([[0.0000, 0.0000],
                [0.1300, 0.2500],
                [0.2500, 0.5000],
                [0.3700, 0.7500],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    curves = []
    for values in to_float64(integral).flatten(0, -2).T:
        u = values[~values.isnan()].clamp(LEAST, 1 - LEAST)
        if not len(u):
            raise InputError("`target` must hold a known number for each target dimension, but all are NaN for one.")
        levels = _levels(len(u)).to(u.device)
        places, group = torch.unique(_empirical_quantiles(u, levels), return_inverse=True)
        zeros = torch.zeros_like(places)
        means = zeros.index_add(0, group, levels) / zeros.index_add(0, group, torch.ones_like(levels))
        ends = u.new_tensor([0.0, 1.0])
        curves.append(torch.stack([torch.cat([ends[:1], part, ends[1:]]) for part in (places, means)]))
    longest = max(curve.shape[1] for curve in curves)
    return torch.stack(
        [torch.cat([curve, curve[:, -1:].expand(-1, longest - curve.shape[1])], 1) for curve in curves], 1
    )


def _levels(num: int) -> Tensor:
    """The frequencies [K] in (0, 1) at which knots lie, for this number of rows."""
    steps = int(num ** (1 / 3))
    lower = {0.5, *(i / steps for i in range(1, steps)), *(2.0**-i for i in range(1, 60))}
    kept = [1.0]
    for level in sorted(lower, reverse=True):
        if level <= 0.5 and num * min(kept[-1] - level, level) >= MIN_ROWS:
            kept.append(level)
    upper = [1 - level for level in reversed(kept[1:]) if level < 0.5]
    return torch.tensor([*reversed(kept[1:]), *reversed(upper)], dtype=torch.float64)


def _empirical_quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [K] of values [N], with linear interpolation; `torch.quantile` is limited to 2^24 values."""
    ordered = values.sort().values
    place = levels * (len(values) - 1)
    left = place.long()
    return torch.lerp(ordered[left], ordered[(left + 1).clamp_max(len(values) - 1)], place - left)


def recalibrate(integral: Tensor, knots: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Map predicted probabilities to calibrated ones, and return the slope of the map too. NaN stays NaN.

    Args:
        integral: Predicted probabilities [..., D, ...].
        knots: [2, D, K].
        axis: The axis of D.

    Example:
        >>> knots = torch.tensor([[[0.0, 0.5, 1.0]], [[0.0, 0.2, 1.0]]])
        >>> recalibrate(torch.tensor([0.25]), knots)
        (tensor([0.1000]), tensor([0.4000]))
    """
    predicted, calibrated = widen(knots)
    u, back = _by_target(integral, axis)
    found, slope = _interpolated(u.clamp(0, 1), predicted, calibrated)
    return back(found), back(slope)


def uncalibrated_levels(level: float | Tensor, knots: Tensor) -> Tensor:
    """The inverse of the map: the predicted probabilities [D], or [D, L], for a calibrated level, or levels [L]. In float64.

    Example:
        >>> knots = torch.tensor([[[0.0, 0.5, 1.0]], [[0.0, 0.2, 1.0]]])
        >>> uncalibrated_levels(0.1, knots)
        tensor([0.2500], dtype=torch.float64)
    """
    predicted, calibrated = widen(knots)
    levels = torch.as_tensor(level, dtype=predicted.dtype, device=predicted.device)
    values = levels.reshape(1, -1).expand(len(predicted), -1).contiguous()
    return _interpolated(values, calibrated, predicted)[0].reshape(len(predicted), *levels.shape)


def _interpolated(x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise linear interpolation at x [D, n] between knots and values [D, K]: values [D, n] and slopes."""
    if torch.compiler.is_compiling():  # exporters to ONNX lack `searchsorted`
        place = (knots[:, None] < x[..., None]).sum(-1)
    else:
        place = torch.searchsorted(knots.contiguous(), x)
    right = place.clamp(1, knots.shape[1] - 1)  # the first knot at or above x
    x0, x1, y0, y1 = (t.gather(1, at) for t in (knots, values) for at in (right - 1, right))
    slope = (y1 - y0) / (x1 - x0)
    return torch.where(x < x1, y0 + slope * (x - x0), torch.where(x.isnan(), x, y1)), slope


def _by_target(values: Tensor, axis: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Values as rows [D, n] in float64, and a function that restores their shape and dtype."""
    moved = values.movedim(axis, 0)
    return widen(moved).reshape(
        len(moved), -1
    ).contiguous(), lambda rows: rows.reshape(moved.shape).movedim(0, axis).to(values.dtype)


# ---------------------------------------------------------------------- moments of a calibrated distribution

_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(3))
_MAX_EDGES = 256


def tail_integrals(
    cdf: Callable[[Tensor], Tensor], components: Components, center: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """E[Y - c], E[(Y - c)^2] and the integral of (F(x) - [x >= c])^2 over x, the CRPS at c. In float64.

    They are sums over panels around each component, within 10 scales of a Gaussian and 5,000 of a Student-t (50 on a device without float64). The rest is ignored.

    Args:
        cdf: The distribution function F of values [...].
        components: Components of the uncalibrated distribution, which show where F rises.
        center: c [...].

    Example:
        >>> one = torch.ones(1, 1)
        >>> normal = Components(0 * one, one, 0 * one)
        >>> [round(float(part), 4) for part in tail_integrals(torch.special.ndtr, normal, torch.ones(1))]
        [-1.0, 2.0, 0.6024]
    """
    location, scale, center = widen(components.location), widen(components.scale), widen(center)
    far = 5000.0 if location.dtype == torch.float64 else 50.0  # farther out, 1 - F has no digits left
    reach, num, bend = (10.0, 25, 2.5) if components.degrees_of_freedom is None else (far, 65, 9.0)
    steps = torch.linspace(-bend, bend, num, dtype=location.dtype, device=location.device).sinh()
    steps = (reach * steps / steps[-1]).reshape(-1, *[1] * location.ndim)
    edges = (location + scale * steps).flatten(0, 1).sort(0).values
    if len(edges) > _MAX_EDGES:
        edges = edges[torch.linspace(0, len(edges) - 1, _MAX_EDGES, device=edges.device).round().long()]
    edges = torch.cat([edges, center.unsqueeze(0)]).sort(0).values
    first, second, squared = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(center)
    for low, high in pairwise(edges):
        half = (high - low) / 2
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
            x = low + half * (1 + node)
            below = x < center
            probability = widen(cdf(x))
            tail = torch.where(below, probability, 1 - probability)
            first = first + weight * half * torch.where(below, -tail, tail)
            second = second + weight * half * 2 * (x - center).abs() * tail
            squared = squared + weight * half * tail.square()
    return first, second, squared


# ---------------------------------------------------------------------- predicted quantiles


def extended_cdf(quantiles: Tensor, levels: Tensor, value: Tensor) -> Tensor:
    """The probability of values [...] from quantiles [..., Q], in float64: linear between quantiles, with exponential tails beyond them.

    The tails start with the mean density between the outermost quantiles. They only need to be monotone, because a recalibration maps
    them to the frequencies of held-out targets.

    Example:
        >>> extended_cdf(torch.tensor([[0.0, 2.0]]), torch.tensor([0.25, 0.75]), torch.tensor([1.0]))
        tensor([0.5000], dtype=torch.float64)
    """
    quantiles, levels, value = widen(quantiles), widen(levels), widen(value)
    first, last, below, above = _tails(quantiles, levels)
    middle = torch.full_like(value, float(levels[0]))
    for i in range(len(levels) - 1):
        low, high = quantiles[..., i], quantiles[..., i + 1]
        share = ((value - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        middle = torch.where(value >= low, levels[i] + (levels[i + 1] - levels[i]) * share, middle)
    lower = levels[0] * torch.exp((value - first).clamp_max(0) / below)
    upper = 1 - (1 - levels[-1]) * torch.exp((last - value).clamp_max(0) / above)
    return torch.where(value < first, lower, torch.where(value > last, upper, middle))


def extended_quantile(quantiles: Tensor, levels: Tensor, level: Tensor) -> Tensor:
    """The inverse of :func:`extended_cdf`: quantiles [...] at levels [...], which are broadcast, in the dtype of the quantiles.

    Example:
        >>> extended_quantile(torch.tensor([[0.0, 2.0]]), torch.tensor([0.25, 0.75]), torch.tensor([0.5]))
        tensor([1.])
    """
    wide, levels = widen(quantiles), widen(levels)
    first, last, below, above = _tails(wide, levels)
    level = level.to(wide.dtype).expand_as(first)
    middle = first
    for i in range(len(levels) - 1):
        share = ((level - levels[i]) / (levels[i + 1] - levels[i])).clamp(0, 1)
        middle = torch.where(level >= levels[i], torch.lerp(wide[..., i], wide[..., i + 1], share), middle)
    lower = first + below * (level / levels[0]).log().clamp_max(0)
    upper = last - above * ((1 - level) / (1 - levels[-1])).log().clamp_max(0)
    return torch.where(level < levels[0], lower, torch.where(level > levels[-1], upper, middle)).to(quantiles.dtype)


def _tails(quantiles: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outermost quantiles, and the positive scales of the exponential tails beyond them."""
    first, last = quantiles[..., 0], quantiles[..., -1]
    width = ((last - first) / (levels[-1] - levels[0])).clamp_min(torch.finfo(quantiles.dtype).tiny ** 0.5)
    return first, last, levels[0] * width, (1 - levels[-1]) * width
