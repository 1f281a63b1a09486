"""An interval for the difference of two methods in a metric that is no mean over test rows, such as an AUROC or a calibration error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.paired_difference import MIN_SEEDS, DifferenceInterval, t_quantile, total_variance
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_integer, check_open_unit, describe

_ELEMENTS = 2**22
"""Weights that the resampling holds in memory at a time, about."""


def metric_difference(
    metric_a: Callable[[Tensor], Tensor],
    metric_b: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> DifferenceInterval:
    """The interval of metric A minus metric B, where test rows and seeds are both random, from a paired bootstrap over the rows.

    Each resample draws the N rows with replacement, the same ones for both methods and all seeds, and weighs a row by how often it was drawn. The
    variances over rows in :func:`~lightning_uq.functional.paired_difference` (r of the mean over seeds, and the mean of the seeds' own) are those over
    the resamples, and everything else is as there. Only variances are taken from the resamples, not quantiles: a calibration error is biased upwards
    in each resample, and quantiles would carry that into the interval. So the interval is symmetric, without a correction for skewness.

    Below 5 seeds the interval holds for these networks alone (``over="rows"``).

    Args:
        metric_a: The metric of method A. It takes weights [R, N] of the test rows, float64 on the CPU, and returns a value for each resample and seed,
            [R, S]. Weights of one mean the metric itself.
        metric_b: The same for method B, with the same seeds and rows.
        num_rows: N, the number of test rows.
        level: Probability that the interval contains the difference.
        num_resamples: Resamples. At 2,000 the half-width varies by 1.6 %.
        generator: Draws the rows, on the CPU.

    Raises:
        InputError: A metric returns another shape, or NaN or infinity for some resample (an AUROC does if no row of one kind is drawn); or a number is
            out of range.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), for the resamples; see there for the rest.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> target = torch.randn(300, generator=draw)
        >>> errors_a, errors_b = (scale * torch.randn(5, 300, generator=draw) for scale in (1.0, 1.5))
        >>> def rmse(errors):
        ...     return lambda weights: (weights @ errors.double().square().T / weights.sum(1, keepdim=True)).sqrt()
        >>> interval = metric_difference(rmse(errors_a), rmse(errors_b), 300, generator=draw)
        >>> interval.lower < -0.5 < interval.upper < 0, interval.over
        (True, 'rows and seeds')
    """
    check_open_unit("level", level)
    check_integer("num_rows", num_rows, 2)
    check_integer("num_resamples", num_resamples, 100)
    point = _differences(metric_a, metric_b, torch.ones(1, num_rows, dtype=torch.float64))[0]
    resampled = torch.cat(
        [
            _differences(metric_a, metric_b, _resample(size, num_rows, generator))
            for size in _chunk_sizes(num_resamples, max(1, _ELEMENTS // num_rows))
        ]
    )
    row_variance, seed_row_variance = resampled.mean(1).var(), resampled.var(0).mean()
    variance, df = total_variance(point, row_variance, seed_row_variance, num_rows)
    over: Literal["rows and seeds", "rows"] = "rows and seeds" if len(point) >= MIN_SEEDS else "rows"
    return DifferenceInterval.around(point.mean(), t_quantile(level, df) * variance.sqrt(), over)


def _chunk_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _resample(size: int, num_rows: int, generator: torch.Generator | None) -> Tensor:
    """How often each row is drawn, [size, N]."""
    drawn = torch.randint(num_rows, (size, num_rows), generator=generator)
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def _differences(metric_a: Callable[[Tensor], Tensor], metric_b: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """A - B for each resample and seed, [R, S]."""
    values = []
    for name, metric in (("metric_a", metric_a), ("metric_b", metric_b)):
        value = metric(weights)
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(weights) or not value.shape[1]:
            raise InputError(
                f"`{name}` must return a value per resample and seed, [R, S] with R = {len(weights)}, but it returned {describe(value)}."
            )
        value = to_float64(value).cpu()
        if not bool(value.isfinite().all()):
            which = "the test rows" if len(weights) == 1 else "resampled test rows"
            raise InputError(
                f"`{name}` must return finite numbers, but it returned NaN or infinity for {which}. It needs more rows of each kind."
            )
        values.append(value)
    a, b = values
    if a.shape != b.shape:
        raise InputError(
            f"`metric_a` returned {a.shape[1]} seeds and `metric_b` {b.shape[1]}. Compare methods with the same seeds."
        )
    return a - b
