"""Intervals for the difference of two methods that were trained with the same seeds and tested on the same rows.

The difference at seed s and row i is taken to be d_si = mu + a_s + b_i + e_si, with random seeds, rows and interactions; mu is wanted. Readers who
judge the same cases make the same design in radiology, from where the variance comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.student_t import student_t_quantile
from lightning_uq.functional.validation import check_integer, check_open_unit, check_shape, describe

MIN_SEEDS = 5
"""The fewest seeds whose spread enters an interval for rows and seeds."""


@dataclass(frozen=True)
class DifferenceInterval:
    """An estimated difference of two methods, A - B, and its confidence interval.

    Attributes:
        difference: The estimate.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
        over: What the interval generalises to. ``"rows and seeds"``: other test rows and other seeds. ``"rows"``: other test rows for these trained
            networks. ``"seeds"``: other seeds for these test rows.

    Example:
        >>> DifferenceInterval(0.2, 0.1, 0.3, over="rows").rows_only
        True
    """

    difference: float
    lower: float
    upper: float
    over: Literal["rows and seeds", "rows", "seeds"]

    @property
    def rows_only(self) -> bool:
        """Whether the interval ignores that other seeds give other networks."""
        return self.over == "rows"

    @classmethod
    def around(
        cls, difference: Tensor, half_width: Tensor, over: Literal["rows and seeds", "rows", "seeds"]
    ) -> DifferenceInterval:
        """The interval of a half-width on both sides of the estimate; both are scalars."""
        centre, half = float(difference), float(half_width)
        return cls(centre, centre - half, centre + half, over)


def paired_difference(
    losses_a: Tensor | Sequence[Tensor],
    losses_b: Tensor | Sequence[Tensor],
    *,
    rows: SeedRows | None = None,
    level: float = 0.95,
) -> DifferenceInterval:
    """The interval of the mean loss of A minus that of B, where test rows and seeds are both random.

    With d_si the difference at seed s and row i, the variance of the mean over all of them is

        V = s + max(r - w, 0),    s = Var_s(d_s.) / S,    r = Var_i(d_.i) / N,    w = MSE / (S N).

    s is the seeds' part and r the rows' part. Both contain the interaction, so its share w (from the residuals' mean square MSE) is taken off once. The
    half-width is sqrt(V) times the quantile of a t distribution, with the degrees of freedom of Welch and Satterthwaite,
    V^2 / (s^2 / (S - 1) + max(r - w, 0)^2 / (N - 1)).

    Below 5 seeds, Var_s is too uncertain: V = r with N - 1 degrees of freedom, which holds for these networks alone (``over="rows"``).

    If rows are skewed, the t quantile is too small. It is multiplied by 1 + c^2 (z^2 - 1) (z^2 + 3) / 18 with the normal quantile z and the skewness c
    of the mean; for rows alone this is the symmetric bootstrap-t interval up to terms of higher order, without its resampling.

    All networks of one method have the same training set, and nothing here says how results would vary with it, unless each seed splits the data anew.
    ``rows`` tells so, and from 5 seeds on, the interval is that of :func:`seed_difference` for the means over each split's test rows. Below 5 seeds it
    holds for these networks alone: see :func:`resplit_half_width`.

    Rows must be independent: for maps, a row is an image and its loss the mean over the positions.

    Args:
        losses_a: Losses [S, N] of method A: seeds, test rows. Errors (0 or 1) may be bool. With ``rows``, also a list of losses [N_s].
        losses_b: Losses of method B, with the same seeds and rows.
        rows: Which test rows each seed has, in the order of the losses; None if they are the same in the same order. The ids decide whether seeds split
            the data anew.
        level: Probability that the interval contains the difference.

    Returns:
        The interval. It is [0, 0] where all losses are equal.

    Raises:
        InputError: Losses are not finite [S, N] of one shape, N < 2, ``level`` is out of range, ``rows`` are others, or have no ``num_train`` where
            it is needed.

    Source: Hillis, Statistics in Medicine 26 (2007) 596, whose degrees of freedom leave out the term in N - 1; Hall, "The Bootstrap and Edgeworth
    Expansion" (1992), section 2.5, for the skewness. ``benchmarks/seed_differences.md`` measures the coverage.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> a = torch.randn(10, 200, generator=draw)
        >>> b = a + 0.3 + 0.1 * torch.randn(10, 1, generator=draw) + torch.randn(200, generator=draw)
        >>> interval = paired_difference(a, b)
        >>> interval.lower < -0.3 < interval.upper, interval.over
        (True, 'rows and seeds')
        >>> paired_difference(a[:3], b[:3]).rows_only
        True
        >>> splits = SeedRows([torch.randperm(1000, generator=draw)[:200] for _ in range(10)], num_train=800)
        >>> paired_difference(a, b, rows=splits).over
        'rows and seeds'
    """
    check_open_unit("level", level)
    if rows is None:
        a, b = _checked("losses", losses_a, losses_b, "[S, N]")
        if a.shape[1] < 2:
            raise InputError(f"`losses_a` has {a.shape[1]} test row. An interval needs at least two rows.")
        return _crossed(a - b, level)
    differences = _by_seed(losses_a, losses_b, rows)
    if rows.is_fixed:
        return _crossed(
            torch.stack([one[at.argsort()] for one, at in zip(differences, rows.positions, strict=True)]), level
        )
    means = torch.stack([one.mean() for one in differences])
    if rows.num_seeds < MIN_SEEDS:
        return DifferenceInterval.around(means.mean(), resplit_half_width(differences, rows, level), "rows")
    return DifferenceInterval.around(
        means.mean(), seed_half_width(means, level, rows.variance_share()), "rows and seeds"
    )


def _crossed(differences: Tensor, level: float) -> DifferenceInterval:
    """The interval for differences [S, N] of the same rows for all seeds."""
    over: Literal["rows and seeds", "rows"] = "rows and seeds" if len(differences) >= MIN_SEEDS else "rows"
    return DifferenceInterval.around(differences.mean(), crossed_half_width(differences, level), over)


def _by_seed(losses_a: Tensor | Sequence[Tensor], losses_b: Tensor | Sequence[Tensor], rows: SeedRows) -> list[Tensor]:
    """Differences [N_s] of each seed, in float64."""
    if len(losses_a) != rows.num_seeds or len(losses_b) != rows.num_seeds:
        raise InputError(
            f"`losses_a` has {len(losses_a)} seeds, `losses_b` {len(losses_b)} and `rows` {rows.num_seeds}. Pass the same seeds."
        )
    differences = []
    for one_a, one_b, at in zip(losses_a, losses_b, rows.positions, strict=True):
        a, b = _checked("losses", one_a, one_b, "[N_s]")
        check_shape("losses_a", a, at.shape, advice="`rows` has another number of rows for this seed.")
        differences.append(a - b)
    return differences


def seed_difference(
    values_a: Tensor,
    values_b: Tensor,
    *,
    level: float = 0.95,
    num_test: int | None = None,
    num_train: int | None = None,
) -> DifferenceInterval:
    """The t interval of a metric's mean difference A - B over seeds, from one value per seed.

    The half-width is t_{S-1} sqrt(v Var_s(d_s)). With one test set for all seeds, v = 1 / S; the interval then holds for these test rows alone
    (``over="seeds"``), since values per seed do not tell how they vary with the rows.

    If each seed splits the same data anew, the splits share rows and their differences are correlated. For that the corrected resampled t test has
    v = 1 / S + num_test / num_train. This is right where one method is better on the same rows after each training, and too wide where the difference
    comes from the noise of the training. No number of splits makes the interval arbitrarily short.

    Args:
        values_a: Values [S] of method A.
        values_b: Values [S] of method B, with the same seeds (and splits).
        level: Probability that the interval contains the difference.
        num_test: Test rows of each split, if each seed has its own; a mean where splits differ in size.
        num_train: Training rows of each split.

    Raises:
        InputError: Values are not finite [S] of one length of at least 2, only one of the sizes is given, or ``level`` or a size is out of range.

    Source: Nadeau & Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003) 239.

    Example:
        >>> a, b = torch.tensor([0.81, 0.83, 0.82, 0.84]), torch.tensor([0.80, 0.80, 0.81, 0.81])
        >>> fixed, resplit = seed_difference(a, b), seed_difference(a, b, num_test=200, num_train=800)
        >>> f"{fixed.difference:.3f} [{fixed.lower:.3f}, {fixed.upper:.3f}]", f"[{resplit.lower:.3f}, {resplit.upper:.3f}]"
        ('0.020 [0.002, 0.038]', '[-0.006, 0.046]')
    """
    check_open_unit("level", level)
    values_a, values_b = _checked("values", values_a, values_b, "[S]")
    num_seeds = len(values_a)
    if num_seeds < 2:
        raise InputError(f"`values_a` has {num_seeds} seed. The spread over seeds needs at least two.")
    if (num_test is None) != (num_train is None):
        raise InputError(
            "`num_test` and `num_train` describe re-splits together. Pass both, or neither for a fixed test set."
        )
    share = 1 / num_seeds
    if num_test is not None and num_train is not None:
        check_integer("num_test", num_test, 1)
        check_integer("num_train", num_train, 1)
        share += num_test / num_train
    differences = values_a - values_b
    half_width = seed_half_width(differences, level, share)
    return DifferenceInterval.around(differences.mean(), half_width, "seeds" if num_test is None else "rows and seeds")


def seed_half_width(differences: Tensor, level: float, share: float) -> Tensor:
    """Half-widths [...] of t intervals for differences [..., S], where a mean has ``share`` of the variance of one seed."""
    df = differences.new_tensor(differences.shape[-1] - 1.0)
    half_width: Tensor = t_quantile(level, df) * (share * differences.var(-1)).sqrt()
    return half_width


def crossed_half_width(differences: Tensor, level: float) -> Tensor:
    """Half-widths [...] of the intervals of :func:`paired_difference` for differences [..., S, N], in float64.

    Example:
        >>> crossed_half_width(torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64), 0.95)  # t with 2 degrees of freedom: 4.303 / sqrt(3)
        tensor(2.4841, dtype=torch.float64)
    """
    num_rows = differences.shape[-1]
    rows = differences.mean(-2)
    row_variance = rows.var(-1) / num_rows
    variance, df = total_variance(differences.mean(-1), row_variance, differences.var(-1).mean(-1) / num_rows, num_rows)
    third_cumulant = (rows - rows.mean(-1, keepdim=True)).pow(3).mean(-1) / num_rows**2
    largest = torch.maximum(variance, row_variance)  # the estimated total can lie below its rows' part
    half_width: Tensor = _widened(level, third_cumulant, largest) * t_quantile(level, df) * variance.sqrt()
    return half_width


def _widened(level: float, third_cumulant: Tensor, variance: Tensor) -> Tensor:
    """By how much the t quantile grows for a mean with this third cumulant and variance, [...]."""
    squared_skewness = torch.where(variance > 0, (third_cumulant / variance**1.5).square(), 0)
    z2 = torch.special.ndtri(variance.new_tensor((1 + level) / 2)).square()
    factor: Tensor = 1 + squared_skewness * ((z2 - 1) * (z2 + 3) / 18).clamp_min(0)
    return factor


def resplit_half_width(differences: Sequence[Tensor], rows: SeedRows, level: float) -> Tensor:
    """The half-width for rows alone where each seed has test rows of its own, which may be other seeds' too.

    The estimate is the mean of the seeds' means, mean_s d_s., for these networks on new rows. A row adds the sum g_u of (d_su - d_s.) / (S n_s) over the
    seeds that it appears in, and different rows are independent, so the variance is n / (n - 1) times the sum of g_u^2, with the rows n of the smallest
    split: the variance of clusters. The t quantile has n - 1 degrees of freedom, and the skewness is treated as in :func:`paired_difference`. With the
    same rows in all seeds, this is that interval; with no row in common, the variance is unbiased too.

    Args:
        differences: Differences [N_s] of each seed.
        rows: The rows.
        level: Probability that the interval contains the difference.

    Source: Liang & Zeger, Biometrika 73 (1986) 13.

    Example:
        >>> rows = SeedRows([torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])])
        >>> resplit_half_width([torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])], rows, 0.95)
        tensor(1.2421, dtype=torch.float64)
    """
    num_rows = rows.fewest
    sums = torch.zeros(rows.num_rows, dtype=torch.float64)
    for one, at in zip(differences, rows.positions, strict=True):
        residual = to_float64(one - one.mean()).cpu()
        sums.index_add_(0, at, residual / (rows.num_seeds * len(residual)))
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
        seed_means: Differences [..., S] of each seed.
        row_variance: r [...], the variance over test rows of the mean difference of these seeds.
        seed_row_variance: The same for one seed, as a mean over the seeds [...]; the interaction's part is w = (this - r) / (S - 1).
        num_rows: N.
        seed_share: The share of one seed's variance that the mean has, if it is not 1 / S.
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
    """The number that the absolute value of a standard t variable stays below with probability ``level``, [...] of [...]."""
    return student_t_quantile((1 + level) / 2, df, torch.zeros_like(df), torch.ones_like(df))


def _checked(name: str, a: object, b: object, axes: str) -> tuple[Tensor, Tensor]:
    """Both in float64, after a look at shapes and values."""
    x, y = (_numbers(f"{name}_{side}", values, axes) for side, values in (("a", a), ("b", b)))
    check_shape(f"{name}_b", y, x.shape, advice=f"`{name}_a` and `{name}_b` need the same seeds in the same order.")
    return x, y


def _numbers(name: str, values: object, axes: str) -> Tensor:
    """Finite real numbers in float64."""
    if not isinstance(values, Tensor):
        raise InputError(f"`{name}` must be a tensor {axes}, but it is {describe(values)}.")
    if values.ndim != axes.count(",") + 1 or not values.numel() or values.is_complex():
        raise InputError(f"`{name}` must be a tensor of real numbers {axes}, but it is {describe(values)}.")
    values = to_float64(values)
    if not bool(values.isfinite().all()):
        num = int((~values.isfinite()).sum())
        raise InputError(
            f"`{name}` must be finite, but {num} of {values.numel()} numbers are infinite or NaN. A mean over them says nothing: bound the"
            " probabilities away from 0, or compare another metric."
        )
    return values
