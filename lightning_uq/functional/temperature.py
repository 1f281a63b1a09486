"""Temperatures: one number that scales logits, fitted on held-out rows.

With inverse temperature b = 1 / T and u = log b, the mean negative log-likelihood of softmax(b l) is convex in b, so that
its one stationary point in u is the optimum. :func:`fit_temperature` finds it by a Newton iteration that keeps a bracket;
plain Newton from T = 1 fails on saturated logits, on logits of another scale, and below chance. For an ensemble with the
temperature inside its members the function may have several minima: :func:`fit_shared_temperature` searches them all.

Source: Guo et al., ICML 2017 (arXiv 1706.04599); Rahaman & Thiery, NeurIPS 2021 (arXiv 2007.08792), for calibrating the
pooled prediction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional._validation import (
    check_choice,
    check_floating,
    check_target,
    check_target_values,
    flatten_classes,
)
from lightning_uq.functional.calibration import bin_statistics, calibration_error, top_label
from lightning_uq.functional.entropy import mean_log_probs

Objective = Literal["nll", "ece"]
Method = Literal["newton", "grid"]
Scope = Literal["pooled", "shared", "member"]

_TOLERANCE = 1e-9  # of dNLL / dlog T
_CHUNK_ELEMENTS = 2**21
_LARGEST = 1e3  # T in units of the logits where the optimum is infinite: near uniform, and labels survive float32
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)

_ROUNDING = 1e-12  # of margins, in units of the logits

_RIGHT = "every row is classified correctly, so that the likelihood rises as T falls to 0; the targets were smoothed"
_VOTES = "the likelihood is largest as T falls to 0, where members only vote; the targets were smoothed"
_CHANCE = (
    "the logits rank the true class hardly better than chance, so that the likelihood rises as T grows; T was set where "
    "predictions are all but uniform"
)
_CONSTANT = "the logits of each row are equal (or there is one class), so that T has no effect; T was set to 1"


class _Point(NamedTuple):
    """The objective and its first two derivatives in u = log(1/T)."""

    nll: float
    slope: float
    curvature: float


class _Solution(NamedTuple):
    temperature: float
    problem: str | None


def fit_temperature(logits: Tensor, target: Tensor, objective: Objective = "nll", method: Method = "newton") -> Tensor:
    """The temperature T with which softmax(logits / T) predicts best.

    ``"newton"`` solves dNLL / dlog T = 0 to 1e-9, whatever the scale of the logits. ``"grid"`` is the original DDU's: the
    first minimum over 0.1, 0.2, ..., 10.0, with either objective. Where no finite positive optimum exists a warning names
    the case, and what is returned is finite and positive all the same: with every row classified correctly each target is
    mixed with a uniform one, (N y + 1/C) / (N + 1); below chance T is 1,000 times the logits' scale.

    Args:
        logits: Logits or log-probabilities [N, C] (or [N, C, ...], each position a row) of held-out rows. A logit of minus
            infinity is read as a probability of 1e-38.
        target: Class indices [N] (or [N, ...]).
        objective: "nll", or "ece" (15 bins) with ``method="grid"``.
        method: "newton" or "grid".

    Returns:
        T, a scalar in float64.

    Raises:
        InputError: Shapes or values are not as above, there is no row, or "ece" is asked of "newton".

    Warns:
        UserWarning: The likelihood has no finite positive optimum.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10)
        >>> target = torch.tensor([0] * 8 + [1] * 2)  # 80 % right: logit 2 / T = log 4
        >>> fit_temperature(logits, target).round(decimals=4)
        tensor(1.4427, dtype=torch.float64)
    """
    _check_method(objective, method)
    rows, classes = calibration_rows(logits, target, 2)
    if method == "grid":
        return _scalar(_grid(lambda T: torch.log_softmax(rows[0] / T, 1), classes, objective), logits)
    return _announce(best_temperature(rows, classes), logits)


def fit_shared_temperature(
    logits: Tensor, target: Tensor, objective: Objective = "nll", method: Method = "newton"
) -> Tensor:
    """The temperature T with which the members' mean, mean_z softmax(l_z / T), predicts best.

    All minima over six decades of T around the logits' scale are found by the signs of the slope, and polished as by
    :func:`fit_temperature`; the lowest is returned. With T inside the members joint predictions stay coherent.

    Args:
        logits: Member logits [Z, N, C] (or [Z, N, C, ...]).
        target: Class indices [N] (or [N, ...]).
        objective: As for :func:`fit_temperature`.
        method: As for :func:`fit_temperature`.

    Returns:
        T, a scalar in float64.

    Raises:
        InputError: As for :func:`fit_temperature`.

    Warns:
        UserWarning: As for :func:`fit_temperature`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10).expand(3, 10, 2)
        >>> fit_shared_temperature(logits, torch.tensor([0] * 8 + [1] * 2)).round(decimals=4)
        tensor(1.4427, dtype=torch.float64)
    """
    _check_method(objective, method)
    rows, classes = calibration_rows(logits, target, 3)
    if method == "grid":
        return _scalar(_grid(lambda T: mean_log_probs(rows / T), classes, objective), logits)
    return _announce(best_temperature(rows, classes) if len(rows) == 1 else _search(rows, classes), logits)


def fit_ensemble_temperature(
    logits: Tensor,
    target: Tensor,
    scope: Scope = "pooled",
    objective: Objective = "nll",
    method: Method = "newton",
) -> Tensor:
    """The temperature of an ensemble, outside its members, inside them, or one a member.

    - ``"pooled"``: T on the log of the mean probabilities, softmax(log mean_z p_z / T); the members stay as they are.
    - ``"shared"``: one T inside all members, see :func:`fit_shared_temperature`.
    - ``"member"``: each member's own, as the original DDU has it.

    Args:
        logits: Member logits [Z, N, C] (or [Z, N, C, ...]).
        target: Class indices [N] (or [N, ...]).
        scope: As above.
        objective: As for :func:`fit_temperature`.
        method: As for :func:`fit_temperature`.

    Returns:
        A scalar, or [Z] with ``"member"``, in float64.

    Raises:
        InputError: As for :func:`fit_temperature`.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 10).expand(3, 10, 2)
        >>> fit_ensemble_temperature(logits, torch.tensor([0] * 8 + [1] * 2), "member").round(decimals=4)
        tensor([2.8854, 2.8854, 2.8854], dtype=torch.float64)
    """
    check_choice("scope", scope, ("pooled", "shared", "member"))
    check_floating("logits", logits, 3, "[Z, N, C, ...]")
    if scope == "shared":
        return fit_shared_temperature(logits, target, objective, method)
    if scope == "member":
        return torch.stack([fit_temperature(member, target, objective, method) for member in logits])
    return fit_temperature(mean_log_probs(_double(logits)), target, objective, method)


def calibrated_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood after the best temperature: what is left of the loss once calibration is repaired.

    A validation loss mixes how well classes are told apart with how well confidences are scaled; since the second can be
    repaired afterwards, this is the one to choose a checkpoint by.

    Args:
        logits: [N, C] (or [N, C, ...]).
        target: Class indices [N] (or [N, ...]).

    Returns:
        The mean over rows in nats, a scalar in float64.

    Raises:
        InputError: As for :func:`fit_temperature`.

    Source: Berta et al., "Rethinking early stopping: refine, then calibrate" (arXiv 2501.19195).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10)
        >>> calibrated_nll(logits, torch.tensor([0] * 8 + [1] * 2)).round(decimals=4)
        tensor(0.5004, dtype=torch.float64)
    """
    rows, classes = calibration_rows(logits, target, 2)
    return _scalar(_objective(rows, classes, 1 / best_temperature(rows, classes).temperature, 0.0).nll, logits)


def _check_method(objective: str, method: str) -> None:
    check_choice("objective", objective, ("nll", "ece"))
    check_choice("method", method, ("newton", "grid"))
    if objective == "ece" and method == "newton":
        raise InputError(
            "Expected argument `method` to be 'grid' with objective='ece', but got 'newton': a calibration error is a "
            "step function, which has no slope to follow."
        )


def _double(logits: Tensor) -> Tensor:
    return (logits.cpu() if logits.device.type == "mps" else logits).detach().double()


def calibration_rows(logits: Tensor, target: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Checked logits [Z, N, C] in float64, finite, and class indices [N]; Z = 1 where ``ndim`` is 2."""
    check_floating("logits", logits, ndim, "[Z, N, C, ...]" if ndim == 3 else "[N, C, ...]")
    members = logits[None] if ndim == 2 else logits
    check_target(target, members.shape[1:2] + members.shape[3:])
    rows = torch.stack([flatten_classes(_double(member)) for member in members])
    if rows.numel() == 0:
        raise InputError(f"Expected argument `logits` to hold at least one row, but got shape {list(logits.shape)}.")
    classes = target.reshape(-1).long().to(rows.device)
    check_target_values(classes, rows.shape[2])
    top = rows.amax(2, keepdim=True)
    if not bool(top.isfinite().all()):
        raise InputError(
            "Expected argument `logits` to hold no NaN, no positive infinity and no row of minus infinities, but got "
            f"{top[~top.isfinite()][0].item()}."
        )
    return torch.where(rows == -math.inf, top + _LOG_TINY, rows), classes


def _scalar(value: float, like: Tensor) -> Tensor:
    device = "cpu" if like.device.type == "mps" else like.device
    return torch.tensor(value, dtype=torch.float64, device=device)


def _announce(solution: _Solution, like: Tensor) -> Tensor:
    if solution.problem is not None:
        warnings.warn(
            f"The likelihood has no finite positive temperature as its optimum: {solution.problem} "
            f"(T = {solution.temperature:.4g}).",
            stacklevel=3,
        )
    return _scalar(solution.temperature, like)


def _grid(log_probs: Callable[[float], Tensor], target: Tensor, objective: Objective) -> float:
    """The first minimum over 0.1, 0.2, ..., 10, added up as the original does."""
    best, chosen, temperature = math.inf, 1.0, 0.1
    for _ in range(100):
        rows = log_probs(temperature)
        if objective == "nll":
            value = float(-rows.gather(1, target[:, None]).mean())
        else:
            value = float(calibration_error(bin_statistics(*top_label(rows.exp(), target), num_bins=15)))
        if value < best:
            best, chosen = value, temperature
        temperature += 0.1
    return chosen


def _scale(logits: Tensor) -> float:
    """Mean distance of a logit from its row's mean."""
    return float((logits - logits.mean(2, keepdim=True)).abs().mean())


def _margins(logits: Tensor, target: Tensor) -> Tensor:
    """Logits relative to that of the target, which keeps full precision where a prediction is all but certain."""
    return logits - logits.gather(2, target.expand(len(logits), -1)[..., None])


def best_temperature(logits: Tensor, target: Tensor) -> _Solution:
    """The optimum for a single predictor, [1, N, C]: the slope in u changes its sign at most once."""
    scale = _scale(logits)
    if scale == 0:
        return _Solution(1.0, _CONSTANT)
    margins = _margins(logits / scale, target)
    right = bool((margins.amax(2) <= _ROUNDING).all())
    smoothing = 1 / (margins.shape[1] + 1) if right else 0.0

    def at(u: float) -> _Point:
        return _objective(margins, target, math.exp(u), smoothing)

    low, high = -math.log(_LARGEST), 1.0
    if at(low).slope >= 0:
        return _Solution(_LARGEST * scale, _CHANCE)
    while at(high).slope < 0:  # ends, since some margin, or the uniform share of the targets, pulls back
        low, high = high, 2 * high
    return _Solution(scale * math.exp(-_root(at, low, high)), _RIGHT if right else None)


def _search(logits: Tensor, target: Tensor) -> _Solution:
    """The lowest minimum for the mean of members, [Z, N, C], which may have several."""
    scale = _scale(logits)
    if scale == 0:
        return _Solution(1.0, _CONSTANT)
    margins = _margins(logits / scale, target)
    uniform = math.log(margins.shape[2])
    for smoothing, problem in ((0.0, None), (1 / (margins.shape[1] + 1), _VOTES)):

        def at(u: float, smoothing: float = smoothing) -> _Point:
            return _objective(margins, target, math.exp(u), smoothing)

        grid = [(u / 4, at(u / 4)) for u in range(-28, 29)]
        while grid[-1][1].slope < 0 and grid[-1][0] < 40:  # where margins are far smaller than the scale
            grid.append((grid[-1][0] + 1, at(grid[-1][0] + 1)))
        steep = [(u, point) for u, point in grid if point.slope != 0]  # a saturated slope is 0 without being a minimum
        minima = [_root(at, a, b) for (a, left), (b, right) in pairwise(steep) if left.slope < 0 < right.slope]
        best = min(minima, key=lambda u: at(u).nll, default=None)
        lowest = uniform if best is None else at(best).nll
        if best is not None and lowest < min(uniform, grid[-1][1].nll + _TOLERANCE):
            return _Solution(scale * math.exp(-best), problem)
        if grid[-1][1].nll >= uniform:
            break
    return _Solution(_LARGEST * scale, _CHANCE)


def _objective(margins: Tensor, target: Tensor, inverse: float, smoothing: float) -> _Point:
    """The pooled negative log-likelihood at 1/T = ``inverse``, its targets mixed with a share ``smoothing`` of uniform ones.

    With s_zc = log p_zc, whose derivatives in u are s' = b (l_c - E_p l) and s'' = s' - b^2 Var_p l, and the responsibilities
    w_z of the members for class c, the pooled L_c = log mean_z exp s_zc has

        L' = sum_z w s',    L'' = sum_z w (s'' + s'^2) - L'^2.
    """
    sums = margins.new_zeros(3)
    for part, classes in _chunks(margins, target):
        log_probs = torch.log_softmax(inverse * part, 2)
        probs = log_probs.exp()
        mean = (probs * part).sum(2, keepdim=True)
        variance = (probs * (part - mean).square()).sum(2, keepdim=True)
        first = inverse * (part - mean)
        second = first - inverse**2 * variance
        chosen = classes.expand(len(part), -1)[..., None]
        hard = _pool(*(values.gather(2, chosen) for values in (log_probs, first, second)))
        sums -= (1 - smoothing) * hard.sum((1, 2))
        if smoothing:
            sums -= smoothing * _pool(log_probs, first, second).mean(2).sum(1)
    return _Point(*(sums / margins.shape[1]).tolist())


def _pool(log_probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[Z, n, C] three times -> the pooled log-probabilities and their derivatives, [3, n, C]."""
    if len(log_probs) == 1:
        return torch.cat([log_probs, first, second])
    weights = log_probs.softmax(0)
    value = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    slope = (weights * first).sum(0)
    curvature = (weights * (second + first.square())).sum(0) - slope.square()
    return torch.stack([value, slope, curvature])


def _chunks(margins: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK_ELEMENTS // (margins.shape[0] * margins.shape[2]))
    return zip(torch.split(margins, size, 1), torch.split(target, size), strict=True)


def _root(at: Callable[[float], _Point], low: float, high: float) -> float:
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
