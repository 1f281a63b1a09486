"""The verdict in words: which method is best if any stands out, which ones are tied with it, and for what this holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.compare.statistics.differences import FEW_ROWS
from lightning_uq.report.table import Column, cell, shown_columns

QUALITY = ("nll", "interval_score", "rmse", "mae", "accuracy")
"""Keys for the quality of predictions. The first one that most methods have decides."""

DETECTION = "ood_auroc"

_HARDLY_DETECTS = 0.6
"""Below this AUROC, the verdict says that being the best detector is worth little."""

_AS_CHEAP = 1.2
"""Times up to this factor apart count as equal, since the time of the same work varies by as much between runs."""

_MAX_NAMES = 4
"""The largest number of methods that a sentence names; further ones are counted."""


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
    """The verdict, in sentences: the best predictions and for what this holds, and the best detection.

    A method is called best if it differs significantly from the baseline or from most methods. Of the methods tied with it, the cheapest is named.

    Args:
        rows: The rows of the results.
        differences: The result of :func:`~lightning_uq.compare.statistics.differences.find_differences`.
        num_seeds: Number of seeds.
        data: Name of the data.
        baseline: The method whose value is shown beside the best one's.
        single_rows: Numbers that one test row dominates: :func:`~lightning_uq.compare.statistics.measures.find_single_rows`.
        untuned: The methods that were not tuned although others were.

    Returns:
        The sentences; empty if there is no deciding number.
    """
    columns = {column.key: column for column in shown_columns(rows)}
    key = quality_key(rows)
    if key is None or not rows:
        return []
    doubts = [*_infinite(rows, columns, key), *_single(columns[key], (single_rows or {}).get(key, {}))]
    if len(rows) == 1:
        return [_alone(rows[0], columns, key, data), *doubts]
    judged = [one for one in (key, DETECTION) if differences.get(one, {}).get("best") is not None]
    overs = {interval["over"] for one in judged for interval in differences[one]["to_best"].values()}
    conditions = [_condition("rows" in overs, num_seeds), ""] if overs else ["", ""]
    sentences = [
        _best(rows, differences[one], columns[one], data, baseline, condition)
        for one, condition in zip(judged, conditions, strict=False)
    ]
    if key in judged:
        sentences[1:1] = doubts
    if overs:
        sentences += few_rows(min(differences[one]["rows"] for one in judged))
    if untuned and len(untuned) < len(rows):
        sentences.append(f"Not all methods were tuned: {listed(untuned)} ran with fixed settings.")
    return sentences


def _alone(row: Mapping[str, Any], columns: Mapping[str, Column], key: str, data: str) -> str:
    numbers = " and ".join(
        f"{columns[one].label} {cell(row, columns[one])[0]}" for one in (key, DETECTION) if one in row
    )
    return f"{row['method']} is the only method on {data}, so there is nothing to compare it with ({numbers})."


def _best(
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
    column: Column,
    data: str,
    baseline: str | None,
    condition: str,
) -> str:
    """The best method by one number, the methods tied with it, and which of these to choose."""
    by_name = {row["method"]: row for row in rows}
    best, to_best = found["best"], found["to_best"]
    value = cell(by_name[best], column)[0]
    equal = found["same"]
    others = [name for name in to_best if name not in equal]
    tied = [name for name in found["tied"] if name not in equal]
    worse = [name for name in others if name not in tied]
    stands_out = baseline in worse or 2 * len(worse) > len(others)
    number, own = column.label.rstrip("."), _same_as(equal)
    by = f"By {number}, {condition}"
    against = (
        f"; {baseline} {cell(by_name[baseline], column)[0]}" if baseline in to_best and baseline not in equal else ""
    )
    cheapest = _cheapest([by_name[name] for name in (best, *equal, *tied)], baseline) if tied else None
    take = "" if column.key == DETECTION or cheapest is None else f", and {cheapest} is the cheapest"
    if not to_best:
        sentence = f"{by}{best} is the only method with a value on {data} ({value})."
    elif not others:
        sentence = f"{by}all methods are equal on {data} ({value}): each test row has the same value."
    elif not tied:
        are = {1: f"{others[0]} is", 2: "both others are"}.get(len(worse), f"all {len(worse)} others are")
        sentence = f"{by}{best}{own} {_best_phrase(column)} on {data} ({value}{against}); {are} worse."
    elif stands_out:
        sentence = f"{by}{best}{own} {_best_phrase(column)} on {data} ({value}{against}); {listed(tied)} cannot be distinguished from it{take}."
    else:
        none = {1: f"{tied[0]} cannot", 2: f"neither {' nor '.join(tied)} can"}.get(
            len(tied), f"none of the {len(tied)} others can"
        )
        none = (
            f"only {listed(worse)} {'are' if len(worse) > 1 else 'is'} worse"
            if worse
            else f"{none} be distinguished from it"
        )
        sentence = (
            f"{by}no method stands out on {data}: {best}{own} has the best mean ({value}{against}), but {none}{take}."
        )
    without = [name for name, row in by_name.items() if column.key not in row]
    infinite = [name for name in by_name if name not in (best, *to_best, *without)]
    for names, lack in ((without, number), (infinite, f"finite {number}")):
        sentence += f" {listed(names)} {'have' if len(names) > 1 else 'has'} no {lack}." if names else ""
    if column.key == DETECTION and by_name[best][DETECTION]["mean"] < _HARDLY_DETECTS:
        sentence += f" Even the best {number} is close to chance, 0.5."
    return sentence


def _infinite(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], key: str) -> list[str]:
    """The methods with an infinite value of a number that would have decided."""
    sentences = []
    for one in QUALITY[: QUALITY.index(key)]:
        names = [row["method"] for row in rows if one in row and not _is_finite(row, one)]
        if names:
            have = "have" if len(names) > 1 else "has"
            sentences.append(f"{listed(names)} {have} no finite {columns[one].label.rstrip('.')}.")
    return sentences


def _single(column: Column, found: Mapping[str, int]) -> list[str]:
    """The methods whose value one test row dominates."""
    if not found:
        return []
    named = [f"{name} (row {row})" for name, row in found.items()]
    return [
        f"A single test row makes up more than half of the {column.label.rstrip('.')} of {listed(named)}; rows count from 0."
    ]


def _same_as(equal: Sequence[str]) -> str:
    return f" (as {listed(equal)}, with the same values)" if equal else ""


def listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d", "e", "f"])
        ('a, b and c', 'a, b, c and 3 others')
    """
    shown = (
        list(names) if len(names) <= _MAX_NAMES else [*names[: _MAX_NAMES - 1], f"{len(names) - _MAX_NAMES + 1} others"]
    )
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _best_phrase(column: Column) -> str:
    return "detects out-of-distribution inputs best" if column.key == DETECTION else "is best"


def _cheapest(rows: Sequence[Mapping[str, Any]], baseline: str | None) -> str | None:
    """The cheapest method by training time, then by prediction time; of several, the baseline, or else the first. None: a time is unknown."""
    for key in ("train_seconds", "ms_per_1000"):
        times = [row.get(key, {}).get("mean") for row in rows]
        if None in times:
            return None
        rows = [row for row, time in zip(rows, times, strict=True) if time <= _AS_CHEAP * min(times)]
    names = [str(row["method"]) for row in rows]
    return baseline if baseline in names else names[0]


def _condition(is_over_rows: bool, num_seeds: int) -> str:
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    if is_over_rows:
        return f"for the networks trained here ({seeds}; 5 would cover retraining), "
    return f"for further test rows and trainings ({seeds}), "


def few_rows(count: int) -> list[str]:
    """A warning sentence that intervals over so few rows are rough, if there are fewer than :data:`~lightning_uq.compare.statistics.differences.FEW_ROWS`.

    Example:
        >>> few_rows(36)[0][:37], few_rows(360)
        ('The intervals rest on only 36 rows. B', [])
    """
    if count >= FEW_ROWS:
        return []
    return [
        f"The intervals rest on only {count} rows. Below {FEW_ROWS} they cover less than their stated level, because rare large losses may be missing."
    ]
