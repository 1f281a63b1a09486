"""One sentence that says which method to take, and on which condition."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.report.table import ALL_COLUMNS, cell

QUALITY = ("nll", "interval_score", "rmse", "mae", "accuracy")
"""Keys that tell how good predictions are, the first one that most methods have decides."""

DETECTION = "ood_auroc"

_COLUMNS = {column.key: column for column in ALL_COLUMNS}
_OVER = {
    "rows": "for these trained networks on other test rows of the same kind; other seeds were too few to be told ({seeds})",
    "rows and seeds": "for other test rows of the same kind and for other seeds ({seeds})",
}


def quality_key(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The key by which methods are judged: the first of :data:`QUALITY` that at least half of the methods have.

    Example:
        >>> quality_key([{"method": "mean", "rmse": {"mean": 1.0}}, {"method": "gaussian", "rmse": {"mean": 1.0}, "nll": {"mean": 2.0}}])
        'nll'
    """
    return next((key for key in QUALITY if 2 * sum(key in row for row in rows) >= len(rows) > 0), None)


def make_verdict(
    rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]], num_seeds: int
) -> list[str]:
    """What the numbers say, in sentences: the best predictions, the best detection, and what they hold for.

    Args:
        rows: The rows of the results.
        differences: Those of :func:`~lightning_uq.compare.differences.find_differences`.
        num_seeds: Number of seeds.

    Returns:
        The sentences; none if there is nothing to compare.
    """
    key = quality_key(rows)
    sentences = [
        _best(rows, differences[one], one, words)
        for one, words in ((key, "predicts best"), (DETECTION, "detects out-of-distribution inputs best"))
        if one is not None and one in differences and differences[one]["best"] is not None
    ]
    overs = {interval["over"] for one in differences.values() for interval in one["to_best"].values()}
    if sentences and overs:
        seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
        condition = _OVER["rows" if "rows" in overs else "rows and seeds"].format(seeds=seeds)
        sentences.append(f"This holds {condition}.")
    return sentences


def _best(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], key: str, words: str) -> str:
    column, best = _COLUMNS[key], found["best"]
    value = cell(next(row for row in rows if row["method"] == best), column)[0]
    others = found["tied"]
    compared = len(found["to_best"])
    sentence = f"{best} {words} ({column.label} {value})"
    if not others:
        return f"{sentence}, better than the other {compared} methods." if compared > 1 else f"{sentence}."
    if len(others) == compared and compared > 1:
        return f"{sentence}, but none of the other {compared} methods can be told from it."
    listed = ", ".join(others[:4]) + (f" and {len(others) - 4} others" if len(others) > 4 else "")
    return f"{sentence}, but {listed} cannot be told from it."
