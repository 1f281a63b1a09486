"""The best of several methods, and the methods that are statistically tied with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lightning_uq.errors import InputError
from lightning_uq.functional.metric_difference import metric_difference
from lightning_uq.functional.paired_difference import DifferenceInterval
from lightning_uq.functional.validation import check_bool, check_open_unit

_Results = TypeVar("_Results")


@dataclass(frozen=True)
class BestMethod:
    """The method with the best mean in the data, and the differences of the others from it.

    Attributes:
        name: Name of the best method.
        differences: For every other method, its value minus the best one's, with an interval.
        level: Level of each of these intervals.

    Example:
        >>> BestMethod("a", {"b": DifferenceInterval(0.2, -0.1, 0.5, over="rows")}, level=0.95).tied
        {'b'}
    """

    name: str
    differences: dict[str, DifferenceInterval]
    level: float

    @property
    def tied(self) -> set[str]:
        """The other methods that cannot be distinguished from the best: those whose interval contains 0."""
        return {name for name, one in self.differences.items() if one.lower <= 0 <= one.upper}


def best_method(
    results: Mapping[str, _Results],
    *,
    level: float = 0.95,
    higher_is_better: bool = False,
    difference: Callable[..., DifferenceInterval] = metric_difference,
) -> BestMethod:
    """Find the best of K methods, and compare every other one with it.

    Each interval has the level 1 - (1 - level) / (K - 1), which is ``level`` itself for two methods. The data choose the best, perhaps because its numbers
    turned out well by chance, so intervals at ``level`` would rule out too many of the others. The correction accounts for the choice: the truly best
    method is ruled out only if one of K - 1 others beats it by chance, whichever the data choose, and only on one side. It is therefore the best or tied
    with it with a probability of at least 1 - (1 - level) / 2. A tied method may still be worse; the data are too few to show it.

    If several methods are equally good, the statement holds for each of them separately, but not for all together. The intervals do not
    correct for the luck of the best, whose lead is on average a little smaller than it looks.

    The rule is Hsu's comparison with the best, restricted to the best in the data, with Bonferroni's bound instead of a quantile that would require
    equal variances and correlations. It refers to the same population as the intervals: only to the trained networks, if they are over rows only.

    Args:
        results: The arguments of ``difference``, by method name. By default these are the metrics of each method from
            :func:`~lightning_uq.functional.resample_metric` with the same rows.
        level: Level of the interval for two methods, in (0, 1).
        higher_is_better: Whether the largest value is the best, unlike for losses.
        difference: Computes the interval from the results of two methods and a keyword ``level``; for instance
            :func:`~lightning_uq.functional.paired_difference` for losses [S, N].

    Raises:
        InputError: There is no method, or ``level`` is out of range. Errors of ``difference`` are raised with the names of the two methods.

    Source: Hsu, Annals of Statistics 9 (1981) 1026; Gupta, Technometrics 7 (1965) 225. ``benchmarks/seed_differences.md`` measures how often the best
    method is kept.

    Example:
        >>> import torch
        >>> from lightning_uq.functional import paired_difference
        >>> rows = torch.rand(5, 400, generator=torch.Generator().manual_seed(0))
        >>> best = best_method({"a": rows + 0.2, "b": rows, "c": rows.flip(1) + 0.001}, difference=paired_difference)
        >>> best.name, best.tied
        ('b', {'c'})
    """
    if not results:
        raise InputError("`results` is empty. Pass the results of at least one method, by name.")
    check_open_unit("level", level)
    check_bool("higher_is_better", higher_is_better)
    level = 1 - (1 - level) / max(1, len(results) - 1)

    def between(a: str, b: str) -> DifferenceInterval:
        try:
            return difference(results[a], results[b], level=level)
        except InputError as error:
            raise InputError(f"{a} - {b}: {error}") from error

    best, *others = results
    for name in others:
        lead = between(best, name).difference
        if (lead < 0) if higher_is_better else (lead > 0):
            best = name
    return BestMethod(best, {name: between(name, best) for name in results if name != best}, level)
