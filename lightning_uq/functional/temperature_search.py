"""The search for the best temperature: Newton iterations within a bracket on the derivative in u = log(1 / T).

With the inverse temperature b = 1 / T and u = log b, the mean negative log-likelihood of softmax(b l) is convex in b, so its only
stationary point in u is the optimum. Plain Newton from T = 1 fails on saturated logits, on logits of another scale, and below
chance; a bracket prevents this. With the temperature inside an ensemble's members, the function may have several minima:
:func:`best_shared_temperature` searches all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.functional.true_class import at_class

_COLDEST = 40
"""log(scale / T) at which predictions are votes."""

_TOLERANCE = 1e-9  # of the likelihood
_LAST_STEP = 1e-6  # of Newton's method in u
_NEAR = 1e-3  # distance from the lower end of the search
_CHUNK_ELEMENTS, _ELSEWHERE = 2**17, 2**24  # logits at a time: to fit in a CPU's cache, and to keep an accelerator busy
_FEW_ELEMENTS = 2**17  # logits in the subset whose optimum starts the search over all of them
_LARGEST = 1e3  # T in units of the logits for an infinite optimum: nearly uniform, but labels survive float32
_ROUNDING = 1e-12  # of margins, in units of the logits
_RIGHT = "every row is classified correctly, so the likelihood rises as T falls to 0; the targets were smoothed"
_VOTES = "the likelihood is largest as T falls to 0, where members only vote; the targets were smoothed"
_CHANCE = (
    "the logits rank the true class hardly better than chance, so the likelihood rises as T grows; T was set so that "
    "predictions are nearly uniform. Check that the targets are those of these outputs"
)
_CONSTANT = "the logits of each row are equal (or there is one class), so T has no effect; T was set to 1"


class Point(NamedTuple):
    """The objective and its first two derivatives in u = log(1/T)."""

    nll: float
    slope: float
    curvature: float


class Solution(NamedTuple):
    """A temperature, and the reason why the likelihood has no finite positive optimum (None if it has one)."""

    temperature: float
    problem: str | None


def best_temperature(logits: Tensor, target: Tensor) -> Solution:
    """The optimum for a single predictor, [1, N, C]: the slope in u changes sign at most once."""
    scale, right = _scale_and_right(logits, target)
    if scale == 0:
        return Solution(1.0, _CONSTANT)
    smoothing = 1 / (logits.shape[1] + 1) if right else 0.0

    def at(u: float) -> Point:
        return pooled_objective(logits, target, scale, math.exp(u), smoothing)

    low, start = -math.log(_LARGEST), 0.0
    if (
        stride := logits.numel() // _FEW_ELEMENTS
    ) > 1:  # the optimum of some of the rows is near that of all, and cheap
        few = best_temperature(logits[:, ::stride], target[::stride]).temperature
        start = max(low, math.log(scale / few))
    u = _root(at, low, math.inf, start)
    # If the slope does not vanish above `low`, the search has ended there.
    if u < low + _NEAR and at(low).slope >= 0:
        return Solution(_LARGEST * scale, _CHANCE)
    return Solution(scale * math.exp(-u), _RIGHT if right else None)


def best_shared_temperature(logits: Tensor, target: Tensor) -> Solution:
    """The lowest of possibly several minima for the mean of members, [Z, N, C]."""
    scale, _ = _scale_and_right(logits, target)
    if scale == 0:
        return Solution(1.0, _CONSTANT)
    uniform = math.log(logits.shape[2])
    for smoothing, problem in ((0.0, None), (1 / (logits.shape[1] + 1), _VOTES)):

        def at(u: float, smoothing: float = smoothing) -> Point:
            return pooled_objective(logits, target, scale, math.exp(u), smoothing)

        grid = [(u / 4, at(u / 4)) for u in range(-28, 29)]
        while grid[-1][1].slope < 0 and grid[-1][0] < _COLDEST:  # if margins are far smaller than the scale
            grid.append((grid[-1][0] + 1, at(grid[-1][0] + 1)))
        steep = [(u, point) for u, point in grid if point.slope != 0]  # a saturated slope is 0 without a minimum
        minima = [
            _root(at, a, b, (a + b) / 2) for (a, left), (b, right) in pairwise(steep) if left.slope < 0 < right.slope
        ]
        best = min(minima, key=lambda u: at(u).nll, default=None)
        lowest = uniform if best is None else at(best).nll
        limit = min(grid[-1][1].nll, at(_COLDEST).nll)  # votes at T = 0 may beat a minimum at a small T
        if best is not None and lowest < min(uniform, limit + _TOLERANCE):
            return Solution(scale * math.exp(-best), problem)
        if limit >= uniform:
            break
    return Solution(_LARGEST * scale, _CHANCE)


def pooled_objective(logits: Tensor, target: Tensor, scale: float, inverse: float, smoothing: float) -> Point:
    """The pooled negative log-likelihood of logits [Z, N, C] / ``scale`` at 1/T = ``inverse``, and its derivatives.

    The targets are mixed with a share ``smoothing`` of uniform targets. With s_zc = log p_zc, whose derivatives in u are
    s' = b (l_c - E_p l) and s'' = s' - b^2 Var_p l, and the responsibilities w_z of the members for class c, the pooled
    L_c = log mean_z exp s_zc has

        L' = sum_z w s',    L'' = sum_z w (s'' + s'^2) - L'^2.
    """
    total = logits.new_zeros(3, dtype=torch.float64)
    for part, classes in _parts(logits, target):
        part = part / scale
        total += (
            _single(part[0], classes, inverse, smoothing)
            if len(part) == 1
            else _mixed(part, classes, inverse, smoothing)
        )
    return Point(*(total / logits.shape[1]).tolist())


def _single(x: Tensor, target: Tensor, b: float, smoothing: float) -> Tensor:
    """The sums [3] over rows [n, C] of a single predictor. One exponential serves the value and both derivatives."""
    x -= x.amax(1, keepdim=True)
    own = at_class(x, target, 1)
    if smoothing:
        own = (1 - smoothing) * own + smoothing * x.mean(1)
    weighted = (b * x).exp_()
    norm = weighted.sum(1)
    mean = weighted.mul_(x).sum(1) / norm
    variance = weighted.mul_(x).sum(1) / norm - mean.square()
    slope = b * (mean - own)
    return torch.stack([(norm.log() - b * own).sum(), slope.sum(), (slope + b**2 * variance).sum()])


def _mixed(x: Tensor, target: Tensor, b: float, smoothing: float) -> Tensor:
    """The sums [3] over rows [Z, n, C] of the mean of several predictors."""
    x -= at_class(x, target, 2).unsqueeze(2)  # keeps full precision for nearly certain predictions
    scaled = b * x
    normalizer = torch.logsumexp(scaled, 2, keepdim=True)
    probs = (scaled - normalizer).exp()
    mean = (probs * x).sum(2, keepdim=True)
    variance = (probs * (x - mean).square()).sum(2, keepdim=True)
    sums = x.new_zeros(3)
    for share, values in ((1 - smoothing, torch.zeros_like(mean)), (smoothing, x)):  # the target's own margin is 0
        if share:
            first = b * (values - mean)
            second = first - b**2 * variance
            sums -= share * _pool(b * values - normalizer, first, second).mean(2).sum(1)
    return sums


def _scale_and_right(logits: Tensor, target: Tensor) -> tuple[float, bool]:
    """The mean distance of a logit from its row's mean, and whether every row is classified correctly, up to rounding."""
    distance, gap = logits.new_zeros(2, dtype=torch.float64)
    for part, classes in _parts(logits, target):
        gap = gap.maximum((part.amax(2) - at_class(part, classes, 2)).amax())
        distance = distance + (part - part.mean(2, keepdim=True)).abs_().mean() * (len(classes) / len(target))
    scale = float(distance)
    return scale, float(gap) <= _ROUNDING * scale


def _parts(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the rows [Z, n, C] in float64, and their classes [n], in order; the rows are never all copied."""
    elements = _CHUNK_ELEMENTS if logits.is_cpu else _ELSEWHERE
    size = max(1, elements // (len(logits) * logits.shape[2]))
    for part, classes in zip(torch.split(logits, size, 1), torch.split(target, size), strict=True):
        yield part.double(), classes


def _pool(log_probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Pool [Z, n, C] three times to the log-probabilities and their derivatives, [3, n, C]."""
    weights = log_probs.softmax(0)
    value = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    slope = (weights * first).sum(0)
    curvature = (weights * (second + first.square())).sum(0) - slope.square()
    return torch.stack([value, slope, curvature])


def _root(at: Callable[[float], Point], low: float, high: float, start: float) -> float:
    """The zero of the slope between ``low``, where it is negative, and ``high``, which may be infinite.

    It uses Newton's method within the bracket. Otherwise it halves the bracket, or doubles the step while there is no upper end. A
    Newton step below 1e-6 leaves an error of its square, so no further call is needed to check it.
    """
    u, reach = start, 1.0
    for _ in range(200):
        point = at(u)
        if point.slope < 0:
            low = u
        else:
            high = u
        top, reach = (u + reach, 2 * reach) if high == math.inf else (high, reach)
        newton = u - point.slope / point.curvature if point.curvature > 0 else math.nan
        following = newton if low < newton < top else top if high == math.inf else (low + high) / 2
        if following == newton and abs(following - u) < _LAST_STEP:
            return following
        if following == u:  # there is no float left inside the bracket
            break
        u = following
    return u
