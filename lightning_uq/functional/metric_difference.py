"""An interval for the difference of two methods in any metric of test rows, such as an AUROC or a calibration error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.half_widths import MIN_SEEDS, t_quantile, total_variance
from lightning_uq.functional.paired_difference import DifferenceInterval, paired_difference
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.validation import check_integer, check_open_unit, check_tensor, describe
from lightning_uq.functional.weighted_metrics import take_columns, weighted_mean

_ELEMENTS = 2**21
"""Weights that the resampling holds in memory at a time, about."""


@dataclass(frozen=True)
class ResampledMetric:
    """One method's metric, and how it varies with the test rows: what :func:`resample_metric` returns.

    Attributes:
        values: The metric of each seed, [S].
        rows: The test rows.
        resampled: The metric of each resample and seed, [R, S], or None where the interval needs no resamples.
        losses: The numbers [N_s] per seed whose mean is the metric, or None for other metrics.
        seed: Names the resamples.
    """

    values: Tensor
    rows: SeedRows
    resampled: Tensor | None
    losses: tuple[Tensor, ...] | None
    seed: int


def resample_metric(
    metric: Callable[..., Tensor],
    vectors: Sequence[Mapping[str, Tensor]],
    rows: SeedRows,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> ResampledMetric:
    """Compute a metric of one method for each seed, and for resampled test rows.

    Each resample draws the distinct rows of each stratum with replacement, and weighs a row by how often it was drawn, in all seeds that it appears
    in. Methods with equal ``rows`` and ``seed`` get the same resamples, so that :func:`metric_difference` can compare any two of them.

    From 5 seeds on, only strata whose rows are the same for all seeds are resampled. The spread over seeds shows how the metric varies with the others.
    For :func:`~lightning_uq.functional.weighted_mean` without strata, nothing is: the rows tell its variance themselves.

    Args:
        metric: Takes a seed's vectors by their names and ``weights`` [R, N_s], float64 on the CPU, and returns a value for each resample, [R]; for
            instance :func:`~lightning_uq.functional.weighted_auroc`, or a ``functools.partial`` of it.
        vectors: Numbers of the test rows, each [N_s], by the names of the arguments of ``metric``, for each seed.
        rows: Which test rows these are.
        num_resamples: Resamples. At 2,000 the half-width varies by 1.6 %.
        seed: Names the resamples.

    Raises:
        InputError: Vectors do not fit ``rows``; the metric returns another shape, or NaN or infinity (an AUROC does if no row of one kind is drawn:
            pass strata); or a number is out of range.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993); Davison & Hinkley, "Bootstrap Methods and their Application" (1997), section
    3.2, for strata.

    Example:
        >>> from lightning_uq.functional import weighted_rmse
        >>> vectors = [{"squared_error": torch.full((30,), 4.0)}, {"squared_error": torch.full((20,), 9.0)}]
        >>> rows = SeedRows([torch.arange(30), torch.arange(20, 40)])
        >>> found = resample_metric(weighted_rmse, vectors, rows)
        >>> found.values, found.resampled.shape
        (tensor([2., 3.], dtype=torch.float64), torch.Size([2000, 2]))
    """
    check_integer("num_resamples", num_resamples, 100)
    if len(vectors) != rows.num_seeds:
        raise InputError(
            f"`vectors` must have an entry for each of the {rows.num_seeds} seeds, but it has {len(vectors)}."
        )
    for number, (one, at) in enumerate(zip(vectors, rows.positions, strict=True)):
        for name, value in one.items():
            check_tensor(f"vectors[{number}][{name!r}]", value, "[N]")
            if value.shape != at.shape:
                raise InputError(
                    f"`vectors[{number}][{name!r}]` must have a number for each of the {len(at)} rows, but it is {describe(value)}."
                )
    vectors = [{name: value.detach().cpu() for name, value in one.items()} for one in vectors]
    values = _by_seed(metric, vectors, [torch.ones(1, len(at), dtype=torch.float64) for at in rows.positions])[0]
    drawn = rows.is_common if rows.num_seeds >= MIN_SEEDS else torch.ones_like(rows.is_common)
    if metric is weighted_mean and len(drawn) == 1:
        return ResampledMetric(values, rows, None, tuple(next(iter(one.values())) for one in vectors), seed)
    resampled = None
    if bool(drawn.any()):
        members = [(rows.stratum == kind).nonzero().squeeze(1) for kind in drawn.nonzero().squeeze(1)]
        generator = torch.Generator().manual_seed(seed)
        chunks = []
        for size in _chunk_sizes(num_resamples, max(1, _ELEMENTS // rows.num_rows)):
            weights = _resample(size, rows.num_rows, members, generator)
            chunks.append(_by_seed(metric, vectors, [take_columns(weights, at) for at in rows.positions]))
        resampled = torch.cat(chunks)
    return ResampledMetric(values, rows, resampled, None, seed)


def metric_difference(a: ResampledMetric, b: ResampledMetric, *, level: float = 0.95) -> DifferenceInterval:
    """The interval of a metric of A minus that of B, where test rows and seeds are both random.

    The variances over rows in :func:`~lightning_uq.functional.paired_difference` (r of the mean over seeds, and the mean of the seeds' own) are those over
    the resamples, and everything else is as there. Only variances are taken from the resamples, not quantiles: a calibration error is biased upwards
    in each resample, and quantiles would carry that into the interval. So the interval is symmetric, without a correction for skewness. N is the
    number of rows of the smallest stratum.

    Below 5 seeds the interval holds for these networks alone (``over="rows"``), whether or not each seed splits the data anew.

    From 5 seeds on, if each seed splits the data anew, the seeds' part s is that of :func:`~lightning_uq.functional.seed_difference`. The rows' part is
    that of the strata whose rows are the same for all seeds, which the spread over seeds cannot show.

    The interval is for the metric that is expected from as many rows. A calibration error from few rows is biased upwards, the more the better calibrated
    a method is, and the interval does not remove that bias: ``benchmarks/seed_differences.md`` measures how much coverage it costs. Where two methods are
    nearly the same, the interval of an AUROC or a calibration error is too wide.

    Args:
        a: The metric of method A.
        b: The same metric of method B, from the same rows and the same seed of resamples.
        level: Probability that the interval contains the difference.

    Raises:
        InputError: The two have other rows, metrics or resamples; ``level`` is out of range; or ``rows`` have no ``num_train`` where it is needed.

    Example:
        >>> from lightning_uq.functional import weighted_auroc
        >>> draw = torch.Generator().manual_seed(0)
        >>> is_ood = torch.arange(300) % 3 == 0
        >>> rows = SeedRows([torch.arange(300)] * 5, strata=[is_ood] * 5)
        >>> found = []
        >>> for distance in (2.0, 1.0):
        ...     scores = distance * is_ood + torch.randn(5, 300, generator=draw)
        ...     found.append(resample_metric(weighted_auroc, [{"score": one, "is_ood": is_ood} for one in scores], rows))
        >>> interval = metric_difference(*found)
        >>> 0 < interval.lower < 0.16 < interval.upper, interval.over
        (True, 'rows and seeds')
    """
    check_open_unit("level", level)
    rows = a.rows
    if rows != b.rows or a.seed != b.seed or (a.losses is None) != (b.losses is None):
        raise InputError("`a` and `b` must have the same metric, rows, `num_train` and `seed`, but they differ.")
    if a.losses is not None and b.losses is not None:
        return paired_difference(a.losses, b.losses, rows=rows, level=level)
    differences = a.values - b.values
    row_variance = seed_row_variance = differences.new_zeros(())
    if a.resampled is not None and b.resampled is not None:
        if len(a.resampled) != len(b.resampled):
            raise InputError(f"`a` has {len(a.resampled)} resamples and `b` {len(b.resampled)}. Draw the same number.")
        resampled = a.resampled - b.resampled
        row_variance, seed_row_variance = resampled.mean(1).var(), resampled.var(0).mean()
    is_wide = rows.num_seeds >= MIN_SEEDS
    share = rows.variance_share() if is_wide else None
    variance, df = total_variance(differences, row_variance, seed_row_variance, rows.fewest, share)
    over: Literal["rows and seeds", "rows"] = "rows and seeds" if is_wide else "rows"
    return DifferenceInterval.around(differences.mean(), t_quantile(level, df) * variance.sqrt(), over)


def _chunk_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _resample(size: int, num_rows: int, members: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """How often each row is drawn, [size, U], from the rows of each stratum; one for rows of no stratum."""
    weights = torch.ones(size, num_rows, dtype=torch.float64)
    for stratum in members:
        drawn = torch.randint(len(stratum), (size, len(stratum)), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        weights[:, stratum] = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    return weights


def _by_seed(
    metric: Callable[..., Tensor], vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[Tensor]
) -> Tensor:
    """The metric of each resample and seed, [R, S]."""
    values = []
    for one, seed_weights in zip(vectors, weights, strict=True):
        value, size = metric(**one, weights=seed_weights), len(seed_weights)
        if not isinstance(value, Tensor) or value.shape != (size,):
            raise InputError(
                f"`metric` must return a value for each resample, [{size}], but it returned {describe(value)}."
            )
        value = to_float64(value).cpu()
        if not bool(value.isfinite().all()):
            which = "the test rows" if size == 1 else "resampled test rows"
            raise InputError(
                f"`metric` must return finite numbers, but it returned NaN or infinity for {which}. It needs more rows of each kind."
            )
        values.append(value)
    return torch.stack(values, 1)
