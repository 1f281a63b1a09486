"""What the numbers say in words: which method is best, which ones cannot be told from it, and what that holds for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.compare.statistics.differences import FEW_ROWS
from lightning_uq.report.table import Column, cell, shown_columns

QUALITY = ("nll", "interval_score", "rmse", "mae", "accuracy")
"""Keys that tell how good predictions are, the first one that most methods have decides."""

DETECTION = "ood_auroc"

_JUDGED = {
    DETECTION: "detects out-of-distribution inputs best",
}

_HARDLY_DETECTS = 0.6
"""Below this AUROC, being the best at a detection is said to be worth little."""

_MAX_NAMES = 4
"""Methods that a sentence names; further ones are counted."""


def quality_key(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The key by which methods are judged: the first of :data:`QUALITY` that is finite for at least half of the methods.

    Example:
        >>> quality_key([{"method": "mean", "rmse": {"mean": 1.0}}, {"method": "gaussian", "rmse": {"mean": 1.0}, "nll": {"mean": 2.0}}])
        'nll'
    """
    return next((key for key in QUALITY if 2 * sum(_is_finite(row, key) for row in rows) >= len(rows) > 0), None)


def _is_finite(row: Mapping[str, Any], key: str) -> bool:
    return key in row and row[key]["mean"] is not None and math.isfinite(row[key]["mean"])


def make_verdict(
    rows: Sequence[Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]],
    num_seeds: int,
    *,
    data: str = "these data",
    baseline: str | None = None,
    single_rows: Mapping[str, Mapping[str, int]] | None = None,
    untuned: Sequence[str] = (),
) -> list[str]:
    """What the numbers say, in sentences: the best predictions, the best detection, and what they hold for.

    Args:
        rows: The rows of the results.
        differences: Those of :func:`~lightning_uq.compare.statistics.differences.find_differences`.
        num_seeds: Number of seeds.
        data: What the data are called.
        baseline: The method whose value stands beside the best one's.
        single_rows: Numbers that one test row decides: :func:`~lightning_uq.compare.statistics.measures.find_single_rows`.
        untuned: The methods that were not tuned, where others were.

    Returns:
        The sentences; none if no number decides.
    """
    columns = {column.key: column for column in shown_columns(rows)}
    key = quality_key(rows)
    if key is None or not rows:
        return []
    doubts = [*_infinite(rows, columns, key), *_single(columns[key], (single_rows or {}).get(key, {}))]
    if len(rows) == 1:
        return [_alone(rows[0], columns, key, data), *doubts]
    judged = [one for one in (key, DETECTION) if differences.get(one, {}).get("best") is not None]
    sentences = [_best(rows, differences[one], columns[one], data, baseline) for one in judged]
    if key in judged:
        sentences[1:1] = doubts
    overs = {interval["over"] for one in judged for interval in differences[one]["to_best"].values()}
    if overs:
        sentences.append(_condition("rows" in overs, num_seeds, data))
        sentences += few_rows(min(differences[one]["rows"] for one in judged))
    if untuned and len(untuned) < len(rows):
        sentences.append(f"Not all methods were tuned: {_listed(untuned)} ran with fixed settings.")
    return sentences


def _alone(row: Mapping[str, Any], columns: Mapping[str, Column], key: str, data: str) -> str:
    numbers = " and ".join(
        f"{columns[one].label} {cell(row, columns[one])[0]}" for one in (key, DETECTION) if one in row
    )
    return f"{row['method']} is the only method on {data}, so there is nothing to compare it with ({numbers})."


def _best(
    rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], column: Column, data: str, baseline: str | None
) -> str:
    """Which method is best by one number, and which others cannot be told from it."""
    by_name = {row["method"]: row for row in rows}
    best, to_best = found["best"], found["to_best"]
    value = cell(by_name[best], column)[0]
    equal = found["same"]
    tied = [name for name in found["tied"] if name not in equal]
    worse = len(to_best) - len(found["tied"])
    own = _same_as(equal)
    against = (
        f"; {baseline} {cell(by_name[baseline], column)[0]}" if baseline in to_best and baseline not in equal else ""
    )
    does = _JUDGED.get(column.key, "is best")
    number, others = column.label.rstrip("."), [name for name in to_best if name not in equal]
    if not to_best:
        sentence = f"By {number}, {best} is the only method with a value on {data} ({value})."
    elif not others:
        sentence = f"By {number}, all methods are equal on {data} ({value}): each test row has the same value."
    elif not tied:
        are = f"{others[0]} is" if worse == 1 else "both others are" if worse == 2 else f"all {worse} others are"
        sentence = f"By {number}, {best}{own} {does} on {data} ({value}{against}); {are} worse."
    elif not worse:
        none = {1: f"{tied[0]} cannot", 2: f"neither {' nor '.join(tied)} can"}.get(
            len(tied), f"none of the {len(tied)} others can"
        )
        sentence = f"By {number}, no method stands out on {data}: {best}{own} has the best mean ({value}{against}), but {none} be told from it."
    else:
        rest = f"the other {worse} are worse" if worse > 1 else "the other one is worse"
        sentence = f"By {number}, {best}{own} {does} on {data} ({value}{against}); {_listed(tied)} cannot be told from it, {rest}."
    without = [name for name, row in by_name.items() if column.key not in row]
    infinite = [name for name in by_name if name not in (best, *to_best, *without)]
    for names, lack in ((without, number), (infinite, f"finite {number}")):
        sentence += f" {_listed(names)} {'have' if len(names) > 1 else 'has'} no {lack}." if names else ""
    if column.key == DETECTION and by_name[best][DETECTION]["mean"] < _HARDLY_DETECTS:
        sentence += f" Even the best {number} is close to chance, 0.5."
    return sentence


def _infinite(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], key: str) -> list[str]:
    """Which methods have an infinite value of a number that would have decided."""
    sentences = []
    for one in QUALITY[: QUALITY.index(key)]:
        names = [row["method"] for row in rows if one in row and not _is_finite(row, one)]
        if names:
            have = "have" if len(names) > 1 else "has"
            sentences.append(f"{_listed(names)} {have} no finite {columns[one].label.rstrip('.')}.")
    return sentences


def _single(column: Column, found: Mapping[str, int]) -> list[str]:
    """Which methods' values one test row decides."""
    if not found:
        return []
    named = [f"{name} (row {row})" for name, row in found.items()]
    return [
        f"A single test row makes up more than half of the {column.label.rstrip('.')} of {_listed(named)}; rows count from 0."
    ]


def _same_as(equal: Sequence[str]) -> str:
    return f" (as {_listed(equal)}, with the same values)" if equal else ""


def _listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence.

    Example:
        >>> _listed(["a", "b", "c"]), _listed(["a", "b", "c", "d", "e", "f"])
        ('a, b and c', 'a, b, c and 3 others')
    """
    shown = (
        list(names) if len(names) <= _MAX_NAMES else [*names[: _MAX_NAMES - 1], f"{len(names) - _MAX_NAMES + 1} others"]
    )
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _condition(is_over_rows: bool, num_seeds: int, data: str) -> str:
    if is_over_rows:
        count = "one seed does" if num_seeds == 1 else f"{num_seeds} seeds do"
        return (
            f"This holds for the networks trained here, on further rows like the test rows of {data}. It may change if they are trained again: {count} "
            "not tell, 5 would."
        )
    return f"This holds for further rows like the test rows of {data}, and for training again with other seeds (judged by {num_seeds} seeds)."


def few_rows(count: int) -> list[str]:
    """A sentence that intervals over so few rows are rough, if they are fewer than :data:`~lightning_uq.compare.statistics.differences.FEW_ROWS`.

    Example:
        >>> few_rows(36)[0][:37], few_rows(360)
        ('The intervals rest on only 36 rows. B', [])
    """
    if count >= FEW_ROWS:
        return []
    return [
        f"The intervals rest on only {count} rows. Below {FEW_ROWS} they hold less often than they say, because rare large losses may be missing."
    ]
