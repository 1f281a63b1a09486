"""Intervals for the difference of two methods that were trained with the same seeds and tested on the same rows.

The model of the difference at seed s and row i is d_si = mu + a_s + b_i + e_si, with random seeds, rows and interactions; mu is estimated. The
same design occurs in radiology, where several readers judge the same cases, and the variance formula comes from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.half_widths import MIN_SEEDS, crossed_half_width, resplit_half_width, seed_half_width
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.validation import check_integer, check_open_unit, check_shape, describe


@dataclass(frozen=True)
class DifferenceInterval:
    """An estimated difference of two methods, A - B, and its confidence interval.

    Attributes:
        difference: The estimate.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
        over: The population that the interval refers to. ``"rows and seeds"``: other test rows and other seeds. ``"rows"``: other test rows for
            these trained networks. ``"seeds"``: other seeds for these test rows.

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
        """Whether the interval ignores the variation between networks of different seeds."""
        return self.over == "rows"

    @classmethod
    def around(
        cls,
        difference: Tensor,
        half_width: Tensor,
        over: Literal["rows and seeds", "rows", "seeds"],
        bound: float | None = None,
    ) -> DifferenceInterval:
        """The interval of a half-width on both sides of the estimate, both scalars, clipped to [-bound, bound]."""
        centre, half = float(difference), float(half_width)
        lower, upper = centre - half, centre + half
        return (
            cls(centre, lower, upper, over)
            if bound is None
            else cls(centre, max(lower, -bound), min(upper, bound), over)
        )


def paired_difference(
    losses_a: Tensor | Sequence[Tensor],
    losses_b: Tensor | Sequence[Tensor],
    *,
    rows: SeedRows | None = None,
    level: float = 0.95,
) -> DifferenceInterval:
    """The interval for the mean loss of A minus that of B, where test rows and seeds are both random.

    With d_si the difference at seed s and row i, the variance of the mean over all of them is

        V = s + max(r - w, 0),    s = Var_s(d_s.) / S,    r = Var_i(d_.i) / N,    w = MSE / (S N).

    s is the seeds' part and r the rows' part. Both contain the interaction, so its share w (from the residuals' mean square MSE) is subtracted once.
    The half-width is sqrt(V) times the quantile of a t distribution, with the degrees of freedom of Welch and Satterthwaite,
    V^2 / (s^2 / (S - 1) + max(r - w, 0)^2 / (N - 1)).

    With fewer than 5 seeds, Var_s is too uncertain: V = r with N - 1 degrees of freedom, which holds only for these networks (``over="rows"``).

    For skewed rows, the t quantile is too small. It is multiplied by 1 + x / (1 + x), where x = c^2 (z^2 - 1) (z^2 + 3) / 18 with the normal quantile
    z and the skewness c of the mean. For small x and rows only, this is the symmetric bootstrap-t interval up to terms of higher order, without its
    resampling. For a large x, which can come from a single row, that expansion is far too wide, and the factor stays below 2.

    If all losses are 0 or 1, the variance over rows includes two additional rows, with the differences 1 / sqrt(S) and -1 / sqrt(S). Otherwise the
    interval of methods that are wrong on the same few rows would have width 0. The estimate is unchanged, and the interval is clipped to [-1, 1].

    With fewer than about 100 rows, intervals of skewed losses cover less often than ``level``, because a rare large loss may not be among the rows.

    Unless each seed splits the data anew, all networks of a method have the same training set, and the interval says nothing about other training
    sets. ``rows`` shows whether the data are split anew. If so, and with 5 seeds or more, the interval is that of :func:`seed_difference` for the means over
    each split's test rows. With fewer seeds it holds only for these networks: see :func:`~lightning_uq.functional.half_widths.resplit_half_width`.

    Rows must be independent: for maps, a row is an image, and its loss is the mean over the positions.

    Args:
        losses_a: Losses [S, N] of method A, by seed and test row. Errors (0 or 1) may be bool. With ``rows``, also a list of losses [N_s].
        losses_b: Losses of method B, with the same seeds and rows.
        rows: The test rows of each seed, in the order of the losses; None if all seeds have the same rows in the same order. The ids show whether the
            seeds split the data anew.
        level: Probability that the interval contains the difference.

    Returns:
        The interval. It is [0, 0] if all losses are equal, unless all are 0 or 1.

    Raises:
        InputError: Losses are not finite [S, N] of one shape, N < 2, ``level`` is out of range, ``rows`` do not fit, or they lack a required
            ``num_train``.

    Source: Hillis, Statistics in Medicine 26 (2007) 596, whose degrees of freedom omit the term in N - 1; Hall, "The Bootstrap and Edgeworth
    Expansion" (1992), section 2.5, for the skewness; Bonett & Price, Journal of Educational and Behavioral Statistics 37 (2012) 479, for the two rows.
    ``benchmarks/seed_differences.md`` measures the coverage.

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
        return _crossed(a - b, level, _bound([a, b]))
    differences = _by_seed(losses_a, losses_b, rows)
    bound = _bound([*losses_a, *losses_b])
    if rows.is_fixed:
        ordered = torch.stack([one[at.argsort()] for one, at in zip(differences, rows.positions, strict=True)])
        return _crossed(ordered, level, bound)
    means = torch.stack([one.mean() for one in differences])
    if rows.num_seeds < MIN_SEEDS:
        half_width = resplit_half_width(differences, rows, level, bound)
        return DifferenceInterval.around(means.mean(), half_width, "rows", bound)
    half_width = seed_half_width(means, level, rows.variance_share())
    return DifferenceInterval.around(means.mean(), half_width, "rows and seeds", bound)


def _bound(losses: Sequence[Tensor]) -> float | None:
    """The largest possible difference of a row that is known in advance: 1 if all losses are 0 or 1."""
    return 1.0 if all(bool(((one == 0) | (one == 1)).all()) for one in losses) else None


def _crossed(differences: Tensor, level: float, bound: float | None) -> DifferenceInterval:
    """The interval for differences [S, N] with the same rows for all seeds."""
    over: Literal["rows and seeds", "rows"] = "rows and seeds" if len(differences) >= MIN_SEEDS else "rows"
    return DifferenceInterval.around(differences.mean(), crossed_half_width(differences, level, bound), over, bound)


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

    The half-width is t_{S-1} sqrt(v Var_s(d_s)). With one test set for all seeds, v = 1 / S. The interval then holds only for these test rows
    (``over="seeds"``), since one value per seed does not show the variation over rows.

    If each seed splits the same data anew, the splits share rows, and their differences are correlated. The corrected resampled t test therefore uses
    v = 1 / S + num_test / num_train. This is correct if one method is better on the same rows after each training, and too wide if the difference comes
    from training noise. No number of splits makes the interval arbitrarily short.

    Args:
        values_a: Values [S] of method A.
        values_b: Values [S] of method B, with the same seeds (and splits).
        level: Probability that the interval contains the difference.
        num_test: Number of test rows of each split, if each seed has its own; their mean if splits differ in size.
        num_train: Number of training rows of each split.

    Raises:
        InputError: Values are not finite [S] of the same length of at least 2, only one of the sizes is given, or ``level`` or a size is out of range.

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


def _checked(name: str, a: object, b: object, axes: str) -> tuple[Tensor, Tensor]:
    """Check shapes and values, and return both in float64."""
    x, y = (_numbers(f"{name}_{side}", values, axes) for side, values in (("a", a), ("b", b)))
    check_shape(f"{name}_b", y, x.shape, advice=f"`{name}_a` and `{name}_b` need the same seeds in the same order.")
    return x, y


def _numbers(name: str, values: object, axes: str) -> Tensor:
    """Check for finite real numbers, and return them in float64."""
    if not isinstance(values, Tensor):
        raise InputError(f"`{name}` must be a tensor {axes}, but it is {describe(values)}.")
    if values.ndim != axes.count(",") + 1 or not values.numel() or values.is_complex():
        raise InputError(f"`{name}` must be a tensor of real numbers {axes}, but it is {describe(values)}.")
    values = to_float64(values)
    if not bool(values.isfinite().all()):
        num = int((~values.isfinite()).sum())
        raise InputError(
            f"`{name}` must be finite, but {num} of {values.numel()} numbers are infinite or NaN, so their mean is meaningless. Bound the"
            " probabilities away from 0, or compare another metric."
        )
    return values
