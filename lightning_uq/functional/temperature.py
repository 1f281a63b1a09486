"""Temperatures: a single number that scales logits, fitted on held-out rows.

:mod:`~lightning_uq.functional.temperature_search` contains the search for the optimum.

Source: Guo et al., ICML 2017 (arXiv 1706.04599); Rahaman & Thiery, NeurIPS 2021 (arXiv 2007.08792), for calibrating the
pooled prediction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration import bin_statistics, calibration_error, top_label
from lightning_uq.functional.calibration_rows import calibration_rows, pooled_rows
from lightning_uq.functional.entropy import mean_log_probs
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.temperature_search import (
    Solution,
    best_shared_temperature,
    best_temperature,
    pooled_objective,
)
from lightning_uq.functional.true_class import at_class
from lightning_uq.functional.validation import check_choice, check_floating

Objective = Literal["nll", "ece"]
Method = Literal["newton", "grid"]
Scope = Literal["pooled", "shared", "member"]


def fit_temperature(logits: Tensor, target: Tensor, objective: Objective = "nll", method: Method = "newton") -> Tensor:
    """The temperature T for which softmax(logits / T) predicts best.

    ``"newton"`` solves dNLL / dlog T = 0 to 1e-9, whatever the scale of the logits. ``"grid"`` is the method of the original DDU: the
    first minimum over 0.1, 0.2, ..., 10.0, with either objective. If no finite positive optimum exists, a warning explains why, and the
    result is still finite and positive: if every row is classified correctly, each target is mixed with a uniform one, (N y + 1/C) / (N
    + 1); if the logits are worse than chance, T is 1,000 times their scale.

    Args:
        logits: Logits or log-probabilities [N, C] of held-out rows, or [N, C, ...] with each position as a row. A logit of minus
            infinity counts as a probability of 1e-38.
        target: Class indices [N] (or [N, ...]).
        objective: "nll", or "ece" (15 bins) with ``method="grid"``.
        method: "newton" or "grid".

    Returns:
        T, a scalar in float64.

    Raises:
        InputError: Shapes or values are invalid, there is no row, or "ece" is combined with "newton".

    Warns:
        UserWarning: The likelihood has no finite positive optimum.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10)
        >>> target = torch.tensor([0] * 8 + [1] * 2)  # 80 % right: logit 2 / T = log 4
        >>> fit_temperature(logits, target).round(decimals=4)
        tensor(1.4427, dtype=torch.float64)
    """
    check_method(objective, method)
    rows, classes = calibration_rows(logits, target, 2)
    if method == "grid":
        wide = rows[0].double()
        return _scalar(_grid(lambda T: torch.log_softmax(wide / T, 1), classes, objective), logits)
    return _announce(best_temperature(rows, classes), logits)


def fit_shared_temperature(
    logits: Tensor, target: Tensor, objective: Objective = "nll", method: Method = "newton"
) -> Tensor:
    """The temperature T for which the members' mean, mean_z softmax(l_z / T), predicts best.

    All minima over six decades of T around the logits' scale are found by sign changes of the slope, and refined as in
    :func:`fit_temperature`; the lowest is returned. With T inside the members, joint predictions stay coherent.

    Args:
        logits: Member logits [Z, N, C] (or [Z, N, C, ...]).
        target: Class indices [N] (or [N, ...]).
        objective: See :func:`fit_temperature`.
        method: See :func:`fit_temperature`.

    Returns:
        T, a scalar in float64.

    Raises:
        InputError: See :func:`fit_temperature`.

    Warns:
        UserWarning: See :func:`fit_temperature`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10).expand(3, 10, 2)
        >>> fit_shared_temperature(logits, torch.tensor([0] * 8 + [1] * 2)).round(decimals=4)
        tensor(1.4427, dtype=torch.float64)
    """
    check_method(objective, method)
    rows, classes = calibration_rows(logits, target, 3)
    if method == "grid":
        wide = rows.double()
        return _scalar(_grid(lambda T: mean_log_probs(wide / T), classes, objective), logits)
    return _announce(
        best_temperature(rows, classes) if len(rows) == 1 else best_shared_temperature(rows, classes), logits
    )


def fit_ensemble_temperature(
    logits: Tensor,
    target: Tensor,
    scope: Scope = "pooled",
    objective: Objective = "nll",
    method: Method = "newton",
) -> Tensor:
    """The temperature of an ensemble: outside its members, inside all members, or one per member.

    - ``"pooled"``: T on the log of the mean probabilities, softmax(log mean_z p_z / T); the members are unchanged.
    - ``"shared"``: one T inside all members, see :func:`fit_shared_temperature`.
    - ``"member"``: a separate T for each member, as in the original DDU.

    Args:
        logits: Member logits [Z, N, C] (or [Z, N, C, ...]).
        target: Class indices [N] (or [N, ...]).
        scope: Place of the temperature.
        objective: See :func:`fit_temperature`.
        method: See :func:`fit_temperature`.

    Returns:
        A scalar, or [Z] with ``"member"``, in float64.

    Raises:
        InputError: See :func:`fit_temperature`.

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
    return fit_temperature(pooled_rows(logits), target, objective, method)


def calibrated_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood at the best temperature: the loss that remains after calibration.

    A validation loss mixes the discrimination of classes with the scaling of confidences. Since the scaling can be corrected afterwards,
    use this loss to choose a checkpoint.

    Args:
        logits: [N, C] (or [N, C, ...]).
        target: Class indices [N] (or [N, ...]).

    Returns:
        The mean over rows in nats, a scalar in float64.

    Raises:
        InputError: See :func:`fit_temperature`.

    Source: Berta et al., "Rethinking early stopping: refine, then calibrate" (arXiv 2501.19195).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10)
        >>> calibrated_nll(logits, torch.tensor([0] * 8 + [1] * 2)).round(decimals=4)
        tensor(0.5004, dtype=torch.float64)
    """
    rows, classes = calibration_rows(logits, target, 2)
    inverse = 1 / best_temperature(rows, classes).temperature
    return _scalar(pooled_objective(rows, classes, 1.0, inverse, 0.0).nll, logits)


def check_method(objective: str, method: str) -> None:
    """Refuse an unknown objective or method, and the combination of "ece" and "newton".

    Raises:
        InputError: The arguments are refused.
    """
    check_choice("objective", objective, ("nll", "ece"))
    check_choice("method", method, ("newton", "grid"))
    if objective == "ece" and method == "newton":
        raise InputError(
            "`method` must be 'grid' with objective='ece', but it is 'newton': a calibration error is a "
            "step function without a slope to follow."
        )


def _scalar(value: float, like: Tensor) -> Tensor:
    return to_float64(like.new_zeros(())).fill_(value)


def _announce(solution: Solution, like: Tensor) -> Tensor:
    if solution.problem is not None:
        warnings.warn(
            f"The likelihood has no finite positive temperature as its optimum: {solution.problem} "
            f"(T = {solution.temperature:.4g}).",
            stacklevel=3,
        )
    return _scalar(solution.temperature, like)


def _grid(log_probs: Callable[[float], Tensor], target: Tensor, objective: Objective) -> float:
    """The first minimum over 0.1, 0.2, ..., 10, with sums in the same order as the original."""
    best, chosen, temperature = math.inf, 1.0, 0.1
    for _ in range(100):
        rows = log_probs(temperature)
        if objective == "nll":
            value = float(-at_class(rows, target, 1).mean())
        else:
            value = float(calibration_error(bin_statistics(*top_label(rows.exp(), target), num_bins=15)))
        if value < best:
            best, chosen = value, temperature
        temperature += 0.1
    return chosen
