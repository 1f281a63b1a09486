"""Which of several methods cannot be told from the best one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TypeVar

from lightning_uq.errors import InputError
from lightning_uq.functional.paired_difference import DifferenceInterval, paired_difference
from lightning_uq.functional.validation import check_bool

_Results = TypeVar("_Results")


def tied_with_best(
    results: Mapping[str, _Results],
    *,
    level: float = 0.95,
    higher_is_better: bool = False,
    difference: Callable[..., DifferenceInterval] = paired_difference,
) -> dict[str, bool]:
    """Whether each method may be the best: no other method beats it significantly.

    A method is ruled out if, for some other one, the one-sided interval of their difference at the error rate (1 - level) / (K - 1) says that it is worse.
    K is the number of methods. With a probability of at least ``level``, the method that is truly best is not ruled out: it would have to lose
    one of its K - 1 comparisons by chance. So every "ruled out" is right together, with that probability. A method that is not ruled out may be worse; the data
    are too few to say so. If several methods are equally good, the statement holds for each of them by itself.

    The best mean in the data has no role. Tests of the differences to it (Holm's, for instance) would take it as given, although it was chosen because
    its numbers turned out well, and would rule out too many. It always remains itself. This is Hsu's comparison with the best, whose set of
    candidates is Gupta's subset selection, with Bonferroni's bound in place of a quantile that would need equal variances and correlations.

    The guarantee is as good as the intervals, and means what they mean: for the trained networks alone, if they are over rows only.

    Args:
        results: What ``difference`` takes, by the method's name: losses [S, N] by default, with the same seeds and rows.
        level: Probability that the best method is kept, in (0.5, 1).
        higher_is_better: Whether the largest is the best, unlike losses.
        difference: Gives the interval for the results of two methods and a keyword ``level``; for instance
            ``functools.partial(metric_difference, num_rows=N)`` for callables that return a metric.

    Returns:
        True for each method that cannot be told from the best, by name, in the order of ``results``.

    Raises:
        InputError: There is no method, or ``level`` is out of range; and what ``difference`` raises, with the names of the two methods.

    Source: Hsu, Annals of Statistics 9 (1981) 1026; Gupta, Technometrics 7 (1965) 225.

    Example:
        >>> import torch
        >>> rows = torch.rand(5, 400, generator=torch.Generator().manual_seed(0))
        >>> tied_with_best({"a": rows, "b": rows.flip(1), "c": rows + 0.2})
        {'a': True, 'b': True, 'c': False}
    """
    if not results:
        raise InputError("`results` is empty. Pass the results of at least one method, by name.")
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.5 < level < 1:
        raise InputError(f"`level` must be a number in (0.5, 1), but it is {level!r}.")
    check_bool("higher_is_better", higher_is_better)
    tied = dict.fromkeys(results, True)
    for a, b in combinations(results, 2):
        two_sided = 1 - 2 * (1 - level) / (len(results) - 1)
        try:
            interval = difference(results[a], results[b], level=two_sided)
        except InputError as error:
            raise InputError(f"{a} - {b}: {error}") from error
        if interval.lower > 0 or interval.upper < 0:
            tied[a if (interval.lower > 0) != higher_is_better else b] = False
    return tied
