"""The best temperature from sums over rows, in memory that is independent of their number.

The negative log-likelihood of softmax(b l), with b = 1 / T, and its first two derivatives are summed at fixed nodes b: at 0, at the
powers of 2 from 2^-40 to 2^12, and between 2^-10 and 2^8 also halfway between them. Sums of batches and of ranks are added.
Between two nodes, the likelihood is approximated by the polynomial of degree 11 in log b that agrees with it, and with both of its
derivatives, at the four nearest nodes. Compared with :mod:`~lightning_uq.functional.temperature_search`, with all rows in memory, the
relative difference in T was at most 3e-8 for T from 2^-8 to 2^10, and 2e-5 for any other T.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_uq.functional.calibration_rows import calibration_rows
from lightning_uq.functional.temperature import _announce
from lightning_uq.functional.temperature_search import (
    _CHANCE,
    _CHUNK_ELEMENTS,
    _CONSTANT,
    _ELSEWHERE,
    _LARGEST,
    _RIGHT,
    _ROUNDING,
    Point,
    Solution,
    _root,
)
from lightning_uq.functional.true_class import at_class

_LOG2 = sorted([*range(-40, 13), *(power + 0.5 for power in range(-10, 8))])  # log2 of b at the nodes
_NODES = len(_LOG2)
SUMS_SHAPE = (_NODES + 3, 3)
"""The shape of the sums of one group."""
ROWS = _NODES + 1
"""Positions in the sums of the number of rows, of wrongly classified rows, and of rows of class 0."""
_FAR = f"it lies outside [2^{-_LOG2[-1]}, 2^{-_LOG2[0]}], the range of the sums; T was set to the nearer end"


def temperature_sums(logits: Tensor, target: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """The contribution of rows to a fit of the temperature; add the tensors of several batches.

    Args:
        logits: Logits or log-probabilities [N, C]. A logit of minus infinity counts as a probability of 1e-38.
        target: Class indices [N].
        group: Index [N] of the group of each row; each group has a separate T. None: one group.
        num_groups: G, the number of groups.

    Returns:
        [G, 74, 3] in float64: at each b the sums of the negative log-likelihood and of its first two derivatives in b; then the
        numbers of rows, of wrongly classified rows, and of rows of class 0; then the sum of the mean distances of the logits from
        the row's mean, and zeros.

    Raises:
        InputError: See :func:`~lightning_uq.functional.temperature.fit_temperature`.

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0]] * 10), torch.tensor([0] * 8 + [1] * 2)
        >>> sums = temperature_sums(logits[:5], target[:5]) + temperature_sums(logits[5:], target[5:])
        >>> fit_temperature_to_sums(sums[0]).round(decimals=4)  # logit 2 / T = log 4
        tensor(1.4427, dtype=torch.float64)
    """
    rows, classes = calibration_rows(logits, target, 2)
    group = torch.zeros_like(classes) if group is None else group.to(classes.device)
    sums = rows.new_zeros(num_groups, *SUMS_SHAPE, dtype=torch.float64)
    size = max(1, (_CHUNK_ELEMENTS if rows.is_cpu else _ELSEWHERE) // rows.shape[2])
    for part, y, own in zip(
        torch.split(rows[0], size), torch.split(classes, size), torch.split(group, size), strict=True
    ):
        for node, values in _contributions(part.double(), y):
            if num_groups == 1:
                sums[0, node] += values.sum(1)
            else:
                sums[:, node].index_add_(0, own, values.T)
    return sums


def _contributions(rows: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The contribution of rows [n, C] to the numbers of each node, [3, n]."""
    margins = rows.T.contiguous()  # [C, n]: sums over few classes are fast along the first axis
    margins -= margins.amax(0)
    true, buffer = at_class(margins, target, 0), torch.empty_like(margins)

    def at(b: float, powers: Tensor) -> Tensor:
        total = powers.sum(0)
        mean = torch.mul(powers, margins, out=buffer).sum(0) / total
        variance = buffer.mul_(margins).sum(0) / total - mean.square()
        return torch.stack([total.log() - b * true, mean - true, variance])

    powers = torch.ones_like(margins)
    yield 0, at(0.0, powers)
    for fraction in (0.0, 0.5):
        for step, power in enumerate(power for power in _LOG2 if power % 1 == fraction):
            # exp(2 b l) = exp(b l)^2 is fast, but doubles the rounding error.
            powers = powers.square_() if step % 8 else (2.0**power * margins).exp_()
            yield 1 + _LOG2.index(power), at(2.0**power, powers)
    is_wrong = true < _ROUNDING * margins.amin(0)
    one, zero = torch.ones_like(true), torch.zeros_like(true)
    yield ROWS, torch.stack([one, torch.where(is_wrong, one, zero), torch.where(target == 0, one, zero)])
    scale = (margins - margins.mean(0)).abs().mean(0)
    yield ROWS + 1, torch.stack([scale, zero, zero])


def fit_temperature_to_sums(sums: Tensor) -> Tensor:
    """The best temperature, a scalar in float64, for the rows summed in ``sums`` [74, 3], at least one.

    Warns:
        UserWarning: The likelihood has no finite positive optimum, see
            :func:`~lightning_uq.functional.temperature.fit_temperature`; or it lies outside [2^-12, 2^40], in which case the
            nearer end is returned.
    """
    return _announce(solve_temperature(sums), sums)


def calibrated_nll_of_sums(sums: Tensor) -> float:
    """The mean negative log-likelihood of the rows at their best temperature, without a warning."""
    return nll_at(sums, solve_temperature(sums).temperature)


def solve_temperature(sums: Tensor) -> Solution:
    """The best temperature for the rows summed in ``sums`` [74, 3], and the reason if it is not an optimum."""
    num, wrong, _ = sums[ROWS].tolist()
    mean = sums / num
    largest = _LARGEST * mean[-1, 0].item()
    if largest == 0:
        return Solution(1.0, _CONSTANT)
    slope = mean[0, 1].item()  # at uniform predictions
    smoothing = 0.0 if wrong else 1 / (num + 1)
    curve = _in_log(mean[1:ROWS] - smoothing * slope * _linear())
    rising = (curve[:, 1] >= 0).nonzero()
    if not len(rising):
        return Solution(2.0 ** -_LOG2[-1], _FAR)
    cell = int(rising[0]) - 1
    if slope >= 0:
        T = math.inf
    elif cell < 0:
        T = 2.0 ** -_LOG2[0]
    else:
        low, high = (math.log(2) * power for power in _LOG2[cell : cell + 2])
        T = math.exp(-_root(lambda u: _point(curve, u), low, high, (low + high) / 2))
    if largest < T:
        return Solution(largest, _CHANCE)
    return Solution(T, _FAR if cell < 0 else None if wrong else _RIGHT)


def nll_at(sums: Tensor, temperature: float) -> float:
    """The mean negative log-likelihood at a temperature for the rows summed in ``sums`` [74, 3]."""
    mean, b = sums / sums[ROWS, 0], 1 / temperature
    if b < 2.0 ** _LOG2[0]:  # nearly uniform, so a parabola suffices
        value, slope, curvature = mean[0].tolist()
        return float(value + b * slope + b * b * curvature / 2)
    return _point(_in_log(mean[1:ROWS]), math.log(b)).nll


def _linear() -> Tensor:
    """The values and derivatives of b itself, [71, 3]."""
    b = torch.tensor(_LOG2, dtype=torch.float64).exp2()
    return torch.stack([b, torch.ones_like(b), torch.zeros_like(b)], 1)


def _in_log(curve: Tensor) -> Tensor:
    """Convert values and derivatives in b to those in u = log b."""
    b = _linear()[:, 0]
    value, slope, curvature = curve.cpu().unbind(1)
    return torch.stack([value, b * slope, b * slope + b.square() * curvature], 1)


def _point(curve: Tensor, u: float) -> Point:
    """Value and derivatives at u = log b of the polynomial through the four nearest of the curve's nodes."""
    first = min(max(bisect(_LOG2, u / math.log(2)) - 2, 0), _NODES - 4)
    nodes = math.log(2) * torch.tensor(_LOG2[first : first + 4], dtype=torch.float64)
    half, middle = float(nodes[3] - nodes[0]) / 2, float(nodes[3] + nodes[0]) / 2
    scale = torch.tensor([1, half, half**2], dtype=torch.float64)
    values = (curve[first : first + 4] * scale).T.flatten()
    coefficients = torch.linalg.solve(_derivatives((nodes - middle) / half).flatten(0, 1), values)
    at = torch.tensor([(u - middle) / half], dtype=torch.float64)
    return Point(*((_derivatives(at) @ coefficients).squeeze(1) / scale).tolist())


def _derivatives(x: Tensor) -> Tensor:
    """The powers x^0, ..., x^11 and their first two derivatives, [3, len(x), 12]."""
    n = torch.arange(12, dtype=torch.float64)
    x = x[:, None]
    return torch.stack([x**n, n * x ** (n - 1).clamp_min(0), n * (n - 1) * x ** (n - 2).clamp_min(0)])
