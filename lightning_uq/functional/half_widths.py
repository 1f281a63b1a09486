"""Half-widths of t intervals for a mean difference over seeds and test rows, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.student_t import student_t_quantile

MIN_SEEDS = 5
"""Minimum number of seeds for their spread to enter an interval over rows and seeds."""


def seed_half_width(differences: Tensor, level: float, share: float) -> Tensor:
    """Half-widths [...] of t intervals for differences [..., S]; ``share`` is the mean's variance relative to one seed's."""
    df = differences.new_tensor(differences.shape[-1] - 1.0)
    half_width: Tensor = t_quantile(level, df) * (share * differences.var(-1)).sqrt()
    return half_width


def crossed_half_width(differences: Tensor, level: float, bound: float | None = None) -> Tensor:
    """Half-widths [...] of the intervals of :func:`~lightning_uq.functional.paired_difference.paired_difference` for differences [..., S, N], in float64.

    Args:
        differences: Differences [..., S, N].
        level: Probability that the interval contains the difference.
        bound: The largest possible difference of a row. The variance over rows then includes two additional rows, with the differences
            ``bound / sqrt(S)`` and ``-bound / sqrt(S)``.

    Example:
        >>> crossed_half_width(torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64), 0.95)  # t with 2 degrees of freedom: 4.303 / sqrt(3)
        tensor(2.4841, dtype=torch.float64)
    """
    seed_means = differences.mean(-1)
    if bound is not None:
        extremes = _extremes(bound, differences.shape[-2]).to(differences).expand(*differences.shape[:-1], 2)
        differences = torch.cat([differences, extremes], -1)
    num_rows = differences.shape[-1]
    rows = differences.mean(-2)
    row_variance = rows.var(-1) / num_rows
    variance, df = total_variance(seed_means, row_variance, differences.var(-1).mean(-1) / num_rows, num_rows)
    third_cumulant = (rows - rows.mean(-1, keepdim=True)).pow(3).mean(-1) / num_rows**2
    largest = torch.maximum(variance, row_variance)  # the estimated total can be smaller than the rows' part
    half_width: Tensor = _widened(level, third_cumulant, largest) * t_quantile(level, df) * variance.sqrt()
    return half_width


def _extremes(bound: float, num_seeds: int) -> Tensor:
    """The differences of the two rows that are added for a known bound.

    Their squares sum to those of two rows per seed in which only this seed differs. With ``bound`` itself, intervals of three or more seeds would be
    up to three times too wide.
    """
    largest = bound / math.sqrt(num_seeds)
    return torch.tensor([largest, -largest], dtype=torch.float64)


def _widened(level: float, third_cumulant: Tensor, variance: Tensor) -> Tensor:
    """The factor by which the t quantile grows for a mean with this third cumulant and variance, [...]; at most 2."""
    squared_skewness = torch.where(variance > 0, (third_cumulant / variance**1.5).square(), 0)
    z2 = torch.special.ndtri(variance.new_tensor((1 + level) / 2)).square()
    excess = squared_skewness * ((z2 - 1) * (z2 + 3) / 18).clamp_min(0)
    factor: Tensor = 1 + excess / (1 + excess)
    return factor


def resplit_half_width(
    differences: Sequence[Tensor], rows: SeedRows, level: float, bound: float | None = None
) -> Tensor:
    """The half-width over rows only, if each seed has its own test rows, which may overlap with other seeds' rows.

    The estimate is the mean of the seeds' means, mean_s d_s., for these networks on new rows. Row u contributes g_u, the sum of
    (d_su - d_s.) / (S n_s) over the seeds in which it appears. Different rows are independent, so the variance is n / (n - 1) times the sum of g_u^2, where n
    is the number of rows of the smallest split (the variance of clusters). The t quantile has n - 1 degrees of freedom, and the skewness is treated as in
    :func:`~lightning_uq.functional.paired_difference.paired_difference`. If all seeds have the same rows, the result is that interval; if no rows are shared,
    the variance is unbiased too.

    Args:
        differences: Differences [N_s] of each seed.
        rows: The rows.
        level: Probability that the interval contains the difference.
        bound: See :func:`crossed_half_width`; the two rows are added to all splits.

    Source: Liang & Zeger, Biometrika 73 (1986) 13.

    Example:
        >>> rows = SeedRows([torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])])
        >>> resplit_half_width([torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])], rows, 0.95)
        tensor(1.2421, dtype=torch.float64)
    """
    num_rows, extremes = rows.fewest, torch.zeros(0, dtype=torch.float64)
    if bound is not None:
        num_rows, extremes = num_rows + 2, _extremes(bound, rows.num_seeds)
    sums = torch.zeros(rows.num_rows + len(extremes), dtype=torch.float64)
    for one, at in zip(differences, rows.positions, strict=True):
        values, num = to_float64(one).cpu(), len(one) + len(extremes)
        mean, share = values.sum() / num, 1 / (rows.num_seeds * num)
        sums.index_add_(0, at, share * (values - mean))
        sums[rows.num_rows :] += share * (extremes - mean)
    variance = num_rows / (num_rows - 1) * sums.square().sum()
    quantile = t_quantile(level, variance.new_tensor(num_rows - 1.0))
    half_width: Tensor = _widened(level, sums.pow(3).sum(), variance) * quantile * variance.sqrt()
    return half_width


def total_variance(
    seed_means: Tensor,
    row_variance: Tensor,
    seed_row_variance: Tensor,
    num_rows: int,
    seed_share: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The variance of a mean difference over rows and seeds, and its degrees of freedom, both [...].

    Args:
        seed_means: Differences [..., S] of the seeds.
        row_variance: r [...], the variance over test rows of the mean difference of these seeds.
        seed_row_variance: The variance over test rows for one seed, averaged over the seeds [...]; the interaction's part is w = (this - r) / (S - 1).
        num_rows: N.
        seed_share: The mean's variance relative to one seed's variance, if it is not 1 / S.
    """
    num_seeds = seed_means.shape[-1]
    if num_seeds < MIN_SEEDS:
        return row_variance, torch.full_like(row_variance, num_rows - 1)
    seeds = seed_means.var(-1) * (1 / num_seeds if seed_share is None else seed_share)
    interaction = (seed_row_variance - row_variance) / (num_seeds - 1)
    rows = (row_variance - interaction).clamp_min(0)
    variance = seeds + rows
    spread = seeds.square() / (num_seeds - 1) + rows.square() / (num_rows - 1)
    return variance, torch.where(spread > 0, variance.square() / spread, num_seeds - 1)


def t_quantile(level: float, df: Tensor) -> Tensor:
    """The number that the absolute value of a standard t variable stays below with probability ``level``, [...] -> [...]."""
    if not df.ndim:
        return df.new_tensor(_t_quantile(level, float(df)))
    return student_t_quantile((1 + level) / 2, df, torch.zeros_like(df), torch.ones_like(df))


@lru_cache(maxsize=1024)  # the differences of a table share level and degrees of freedom, and a bisection takes 5 ms
def _t_quantile(level: float, df: float) -> float:
    one = torch.ones((), dtype=torch.float64)
    return float(student_t_quantile((1 + level) / 2, df * one, 0 * one, one))
