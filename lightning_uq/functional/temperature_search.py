"""The search for the best temperature: Newton iterations within a bracket on the derivative in u = log(1 / T).

With the inverse temperature b = 1 / T and u = log b, the mean negative log-likelihood of softmax(b l) is convex in b, so its one
stationary point in u is the optimum. Plain Newton from T = 1 fails on saturated logits, on logits of another scale, and below
chance; a bracket does not. For an ensemble with the temperature inside its members the function may have several minima:
:func:`best_shared_temperature` searches them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.functional.true_class import at_class

_COLDEST = 40
"""log(scale / T) at which predictions are votes."""

_TOLERANCE = 1e-9  # of dNLL / dlog T
_CHUNK_ELEMENTS = 2**19  # what a cache holds
_LARGEST = 1e3  # T in units of the logits where the optimum is infinite: near uniform, and labels survive float32
_ROUNDING = 1e-12  # of margins, in units of the logits
_RIGHT = "every row is classified correctly, so that the likelihood rises as T falls to 0; the targets were smoothed"
_VOTES = "the likelihood is largest as T falls to 0, where members only vote; the targets were smoothed"
_CHANCE = (
    "the logits rank the true class hardly better than chance, so that the likelihood rises as T grows; T was set where "
    "predictions are all but uniform"
)
_CONSTANT = "the logits of each row are equal (or there is one class), so that T has no effect; T was set to 1"


class Point(NamedTuple):
    """The objective and its first two derivatives in u = log(1/T)."""

    nll: float
    slope: float
    curvature: float


class Solution(NamedTuple):
    """A temperature, and why the likelihood has no finite positive optimum (None if it has one)."""

    temperature: float
    problem: str | None


def best_temperature(logits: Tensor, target: Tensor) -> Solution:
    """The optimum for a single predictor, [1, N, C]: the slope in u changes its sign at most once."""
    scale = logit_scale(logits)
    if scale == 0:
        return Solution(1.0, _CONSTANT)
    margins = target_margins(logits / scale, target)
    right = bool((margins.amax(2) <= _ROUNDING).all())
    smoothing = 1 / (margins.shape[1] + 1) if right else 0.0

    def at(u: float) -> Point:
        return pooled_objective(margins, math.exp(u), smoothing)

    low, high = -math.log(_LARGEST), 1.0
    if at(low).slope >= 0:
        return Solution(_LARGEST * scale, _CHANCE)
    while at(high).slope < 0:  # ends, since some margin, or the uniform share of the targets, pulls back
        low, high = high, 2 * high
    return Solution(scale * math.exp(-_root(at, low, high)), _RIGHT if right else None)


def best_shared_temperature(logits: Tensor, target: Tensor) -> Solution:
    """The lowest minimum for the mean of members, [Z, N, C], which may have several."""
    scale = logit_scale(logits)
    if scale == 0:
        return Solution(1.0, _CONSTANT)
    margins = target_margins(logits / scale, target)
    uniform = math.log(margins.shape[2])
    for smoothing, problem in ((0.0, None), (1 / (margins.shape[1] + 1), _VOTES)):

        def at(u: float, smoothing: float = smoothing) -> Point:
            return pooled_objective(margins, math.exp(u), smoothing)

        grid = [(u / 4, at(u / 4)) for u in range(-28, 29)]
        while grid[-1][1].slope < 0 and grid[-1][0] < _COLDEST:  # where margins are far smaller than the scale
            grid.append((grid[-1][0] + 1, at(grid[-1][0] + 1)))
        steep = [(u, point) for u, point in grid if point.slope != 0]  # a saturated slope is 0 without being a minimum
        minima = [_root(at, a, b) for (a, left), (b, right) in pairwise(steep) if left.slope < 0 < right.slope]
        best = min(minima, key=lambda u: at(u).nll, default=None)
        lowest = uniform if best is None else at(best).nll
        limit = min(grid[-1][1].nll, at(_COLDEST).nll)  # the votes at T = 0 may be better than a minimum at a small T
        if best is not None and lowest < min(uniform, limit + _TOLERANCE):
            return Solution(scale * math.exp(-best), problem)
        if limit >= uniform:
            break
    return Solution(_LARGEST * scale, _CHANCE)


def pooled_objective(margins: Tensor, inverse: float, smoothing: float) -> Point:
    """The pooled negative log-likelihood of margins at 1/T = ``inverse``, its targets mixed with a share ``smoothing`` of uniform ones.

    With s_zc = log p_zc, whose derivatives in u are s' = b (l_c - E_p l) and s'' = s' - b^2 Var_p l, and the responsibilities
    w_z of the members for class c, the pooled L_c = log mean_z exp s_zc has

        L' = sum_z w s',    L'' = sum_z w (s'' + s'^2) - L'^2.
    """
    sums = margins.new_zeros(3)
    for part in torch.split(margins, max(1, _CHUNK_ELEMENTS // (len(margins) * margins.shape[2])), 1):
        scaled = inverse * part
        normalizer = torch.logsumexp(scaled, 2, keepdim=True)
        probs = (scaled - normalizer).exp()
        mean = (probs * part).sum(2, keepdim=True)
        variance = (probs * (part - mean).square()).sum(2, keepdim=True)
        for share, values in (
            (1 - smoothing, torch.zeros_like(mean)),
            (smoothing, part),
        ):  # the target's own margin is 0
            if share:
                first = inverse * (values - mean)
                second = first - inverse**2 * variance
                sums -= share * _pool(inverse * values - normalizer, first, second).mean(2).sum(1)
    return Point(*(sums / margins.shape[1]).tolist())


def logit_scale(logits: Tensor) -> float:
    """Mean distance of a logit from its row's mean."""
    return float((logits - logits.mean(2, keepdim=True)).abs().mean())


def target_margins(logits: Tensor, target: Tensor) -> Tensor:
    """Logits relative to that of the target, which keeps full precision where a prediction is all but certain."""
    return logits - at_class(logits, target, 2).unsqueeze(2)


def _pool(log_probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[Z, n, C] three times -> the pooled log-probabilities and their derivatives, [3, n, C]."""
    if len(log_probs) == 1:
        return torch.cat([log_probs, first, second])
    weights = log_probs.softmax(0)
    value = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    slope = (weights * first).sum(0)
    curvature = (weights * (second + first.square())).sum(0) - slope.square()
    return torch.stack([value, slope, curvature])


def _root(at: Callable[[float], Point], low: float, high: float) -> float:
    """Where the slope vanishes between ``low``, where it is negative, and ``high``: Newton within the bracket, else halving."""
    u = (low + high) / 2
    for _ in range(200):
        point = at(u)
        if point.slope < 0:
            low = u
        else:
            high = u
        newton = u - point.slope / point.curvature if point.curvature > 0 else math.nan
        following = newton if low < newton < high else (low + high) / 2
        if abs(point.slope) < _TOLERANCE and abs(following - u) < _TOLERANCE:
            break
        if following == u:  # the bracket has no float left inside
            break
        u = following
    return u
