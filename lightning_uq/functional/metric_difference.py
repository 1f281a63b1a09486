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
"""Approximate number of weights that the resampling holds in memory at a time."""


@dataclass(frozen=True)
class ResampledMetric:
    """One method's metric and its variation over test rows, from :func:`resample_metric`.

    Attributes:
        values: The metric of each seed, [S].
        rows: The test rows.
        resampled: The metric for each resample and seed, [R, S]; None if the interval needs no resamples.
        losses: For a metric that is a mean: the numbers [N_s] per seed that are averaged. None for other metrics.
        seed: Seed of the resamples.
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

    Each resample draws the distinct rows of each stratum with replacement. A row's weight is the number of times it was drawn, for all seeds in which
    it appears. Methods with equal ``rows`` and ``seed`` get the same resamples, so that :func:`metric_difference` can compare any two of them.

    With 5 seeds or more, only strata whose rows are the same for all seeds are resampled; for the others, the spread over seeds shows the variation.
    :func:`~lightning_uq.functional.weighted_mean` without strata needs no resamples, because its variance follows from the rows themselves.

    Args:
        metric: Called with a seed's vectors by name and ``weights`` [R, N_s], float64 on the CPU; returns one value per resample, [R]. For
            instance :func:`~lightning_uq.functional.weighted_auroc`, or a ``functools.partial`` of it.
        vectors: For each seed, vectors [N_s] over the test rows, by the names of the arguments of ``metric``.
        rows: The test rows.
        num_resamples: Number of resamples. With 2,000, the half-width varies by 1.6 %.
        seed: Seed of the resamples.

    Raises:
        InputError: Vectors do not fit ``rows``; the metric returns another shape, NaN or infinity (an AUROC does if no row of one kind is drawn, so
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
    """The interval for a metric of A minus that of B, where test rows and seeds are both random.

    The formula is that of :func:`~lightning_uq.functional.paired_difference`, with its variances over rows (r for the mean over seeds, and the mean of
    the seeds' own) taken from the resamples. Only variances come from the resamples, not quantiles: a calibration error is biased upwards in each
    resample, and quantiles would carry that bias into the interval. The interval is therefore symmetric, without a correction for skewness. N is the
    number of rows of the smallest stratum.

    With fewer than 5 seeds, the interval holds only for these networks (``over="rows"``), whether or not each seed splits the data anew.

    With 5 seeds or more, if each seed splits the data anew, the seeds' part s is that of :func:`~lightning_uq.functional.seed_difference`. The rows'
    part then includes only strata whose rows are the same for all seeds, because the spread over seeds does not show their variation.

    The interval is for the expected metric on the same number of rows. On few rows, a calibration error is biased upwards, and more so for better
    calibrated methods. The interval does not remove that bias; ``benchmarks/seed_differences.md`` measures the loss of coverage. If two methods are
    nearly the same, the interval of an AUROC or a calibration error is too wide.

    Args:
        a: The metric of method A.
        b: The same metric of method B, with the same rows and the same seed of resamples.
        level: Probability that the interval contains the difference.

    Raises:
        InputError: The rows, metrics or resamples differ; ``level`` is out of range; or ``rows`` lack a required ``num_train``.

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
    """Number of times that each row is drawn, [size, U], from the rows of each stratum; 1 for rows outside all strata."""
    weights = torch.ones(size, num_rows, dtype=torch.float64)
    for stratum in members:
        drawn = torch.randint(len(stratum), (size, len(stratum)), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        weights[:, stratum] = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    return weights


def _by_seed(
    metric: Callable[..., Tensor], vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[Tensor]
) -> Tensor:
    """The metric for each resample and seed, [R, S]."""
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
