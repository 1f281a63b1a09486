"""P-values of scores against calibration rows, thresholds with a given false alarm rate, and outlier detection in a batch.

Higher scores are further out of distribution. The calibration rows must be exchangeable with a new row of the same distribution, and
must not have been used in any fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.functional.conformal import conformal_quantile, exact_fraction
from lightning_uq.functional.precision import widen
from lightning_uq.functional.selective_threshold import binomial_cdf
from lightning_uq.functional.validation import (
    check_closed_unit,
    check_floating,
    check_no_nan,
    check_open_unit,
    check_shape,
)


def conformal_p_values(score: Tensor, calibration: Tensor) -> Tensor:
    """The p-value (1 + number of calibration scores that are at least as high) / (n + 1) of each score, [...] -> [...].

    For a new row from the calibration rows' distribution, P(p <= alpha) <= alpha for every alpha. P-values of several rows share the calibration
    rows, so they are positively dependent.

    Args:
        score: Scores [...]; higher is further out. Plus infinity and NaN get the smallest p-value.
        calibration: Scores [n] of the calibration rows, in any order.

    Returns:
        [...] in float64 (float32 if the device has no float64), in [1 / (n + 1), 1].

    Raises:
        InputError: An argument is not a floating-point tensor with these axes, or ``calibration`` holds NaN.

    Source: Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005; Bates et al., Annals of Statistics 51 (2023).

    Example:
        >>> conformal_p_values(torch.tensor([0.0, 3.0, 9.0]), torch.tensor([2.0, 1.0, 3.0]))
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_floating("score", score, 0, "[...]")
    check_floating("calibration", calibration, 1, "[n]")
    check_shape("calibration", calibration, torch.Size([calibration.numel()]))
    check_no_nan("calibration", calibration)
    return p_values_among(score, calibration.sort().values)


def p_values_among(score: Tensor, ascending: Tensor) -> Tensor:
    """:func:`conformal_p_values` for calibration scores [n] in ascending order, which is not checked. It can be exported."""
    n = len(ascending)
    wide = widen(score)
    ordered = ascending.to(wide)
    wide = torch.where(wide.isnan(), torch.inf, wide)
    below = (
        _num_below(ordered, wide) if torch.compiler.is_compiling() else torch.searchsorted(ordered, wide.contiguous())
    )
    return (n - below + 1).to(wide) / (n + 1)


def _num_below(ordered: Tensor, values: Tensor) -> Tensor:
    """How many of the sorted numbers [n] are below each value, by bisection: exporters to ONNX lack ``searchsorted``."""
    n = len(ordered)
    found = torch.zeros(values.shape, dtype=torch.long, device=values.device)
    for step in (2**power for power in reversed(range(n.bit_length()))):
        ahead = found + step
        inside = ahead <= n
        is_below = ordered[(ahead - 1).clamp(max=n - 1)] < values
        found = torch.where(inside & is_below, ahead, found)
    return found


def alarm_threshold(calibration: Tensor, false_alarm_rate: float, delta: float | None = None) -> Tensor:
    """The threshold that a new row from the calibration rows' distribution exceeds with a probability of at most ``false_alarm_rate``.

    Without ``delta``, the probability is over the calibration rows and the new row. The threshold is the k-th highest score with
    k = floor((n + 1) rate), and a row exceeds it if its p-value is at most the rate. Given the calibration rows and no ties, the share of
    new rows above the k-th highest of n scores has a Beta(k, n + 1 - k) distribution. With ``delta``, k is the largest number for which
    this share is at most the rate with probability 1 - delta.

    Args:
        calibration: Scores [n].
        false_alarm_rate: Rate in (0, 1).
        delta: Probability in (0, 1) that the rate is exceeded, or None.

    Returns:
        A scalar in float64. If there are too few rows, it is plus infinity, which no score exceeds: fewer than 1 / rate - 1, or with
        ``delta`` fewer than log(delta) / log(1 - rate).

    Raises:
        InputError: An argument is out of range, or a score is NaN.

    Source: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012, for the share given the calibration rows.

    Example:
        >>> scores = torch.arange(1.0, 101.0)
        >>> float(alarm_threshold(scores, 0.05)), float(alarm_threshold(scores, 0.05, delta=0.1))
        (96.0, 99.0)
    """
    check_open_unit("false_alarm_rate", false_alarm_rate)
    check_floating("calibration", calibration, 1, "[n]")
    check_no_nan("calibration", calibration)
    if delta is None:
        return conformal_quantile(calibration, false_alarm_rate)
    check_open_unit("delta", delta)
    n = len(calibration)
    rank = 0
    for step in (2**power for power in reversed(range(n.bit_length()))):
        # P(Beta(k, n + 1 - k) > rate) = P(Binomial(n, rate) < k), which grows with k.
        if rank + step <= n and binomial_cdf(rank + step - 1, n, false_alarm_rate) <= delta:
            rank += step
    if not rank:
        return torch.tensor(math.inf, dtype=torch.float64)
    return torch.topk(widen(calibration), rank).values[-1].double()


def benjamini_hochberg(p_values: Tensor, false_discovery_rate: float) -> Tensor:
    """Find outliers in a batch such that on average at most a share ``false_discovery_rate`` of the findings are wrong: bool [B].

    The threshold is the k-th smallest p-value for the largest k at which it is at most k rate / B. The rate holds for independent p-values, and for
    conformal p-values that share calibration rows. P-values are small enough only with about B / (rate * number of outliers) calibration rows.

    Args:
        p_values: P-values [B], in [0, 1].
        false_discovery_rate: Rate in (0, 1).

    Raises:
        InputError: An argument is out of range.

    Source: Benjamini & Hochberg, JRSS B 57 (1995); Bates et al., Annals of Statistics 51 (2023), for conformal p-values.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.03, 0.9, 0.001, 0.5]), 0.1)
        tensor([ True, False,  True, False])
    """
    check_floating("p_values", p_values, 1, "[B]")
    check_open_unit("false_discovery_rate", false_discovery_rate)
    for bound in (p_values.amin(), p_values.amax()) if len(p_values) else ():
        check_closed_unit("p_values", float(bound))
    ordered = widen(p_values).sort().values
    rank = torch.arange(1, len(ordered) + 1, device=ordered.device)
    passed = ordered * len(ordered) <= rank * float(exact_fraction(false_discovery_rate)) * (1 + 1e-12)
    if not bool(passed.any()):
        return torch.zeros_like(p_values, dtype=torch.bool)
    return widen(p_values) <= ordered[passed].amax()
