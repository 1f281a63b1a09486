"""The results of testing a user's own module, in the layout of a comparison: one row, with intervals over the test rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.compare.environment import git_state, versions
from lightning_uq.compare.records import Record
from lightning_uq.compare.results import FORMAT, make_rows
from lightning_uq.compare.statistics.value_intervals import mean_interval, value_intervals
from lightning_uq.compare.statistics.verdict import few_rows
from lightning_uq.report import cell, score_label, shown_columns
from lightning_uq.report.table import number_text
from lightning_uq.tasks import Task, describe

_NAMES = {
    "accuracy": "an accuracy",
    "nll": "an NLL",
    "rmse": "an RMSE",
    "mae": "a mean absolute error",
    "iou": "a mean IoU",
    "interval_score": "an interval score",
    "ood_auroc": "an AUROC",
}
_HEADLINES = (("accuracy", "nll"), ("accuracy", "iou"), ("rmse", "nll"), ("mae", "interval_score"), ("rmse", "mae"))
"""Pairs of numbers for the quality of predictions. The first pair that a module has begins the verdict."""


def make_own_results(
    record: Record,
    *,
    data: str,
    task: Task,
    score: str,
    sizes: Mapping[str, int],
    about: str = "",
    calibrated_by: Sequence[str] = (),
) -> dict[str, Any]:
    """The contents of ``results.json`` for one tested module.

    Args:
        record: The record of the module.
        data: Name of the test data.
        task: The task of the module.
        score: Name of the out-of-distribution score.
        sizes: Numbers of rows of the test data (``"test"``) and of each out-of-distribution loader, by name.
        about: A description of the module in one line.
        calibrated_by: Names of the callbacks that calibrate the predictions.
    """
    rows = make_rows({record.method: [record]})
    intervals = {key: {record.method: [*ends]} for key, ends in value_intervals(record).items()}
    outside = {name: size for name, size in sizes.items() if name != "test"}
    return {
        "format": FORMAT,
        "kind": "test",
        "data": data,
        "task": type(task).__name__.lower(),
        "verdict": make_own_verdict(rows[0], record, intervals, score),
        "rows": rows,
        "baseline": record.method,
        "differences": {},
        "intervals": intervals,
        "methods": {
            record.method: {
                "about": about or describe(task),
                "link": None,
                "ood_score": score,
                "trained_as": None,
                "num_indices": record.num_indices,
            }
        },
        "problem": {
            "name": data,
            "sizes": {"test": sizes["test"], "ood": sum(outside.values())},
            "kept": len(record.row_ids),
            "ood": outside,
            "calibrated_by": list(calibrated_by),
        },
        "versions": versions(),
        "git": git_state(),
    }


def make_own_verdict(
    row: Mapping[str, Any], record: Record, intervals: Mapping[str, Mapping[str, Any]], score: str
) -> list[str]:
    """The verdict in sentences: how good and how calibrated the predictions are, how well they detect, and for what this holds.

    Args:
        row: The row of the results.
        record: The record.
        intervals: The interval of each number by key and method.
        score: Name of the out-of-distribution score.
    """
    columns = {column.key: column for column in shown_columns([row])}

    def number(key: str) -> str:
        text = f"{_NAMES.get(key, columns[key].label)} of {cell(row, columns[key])[0]}"
        ends = intervals.get(key, {}).get(record.method)
        return text if ends is None else f"{text} [{', '.join(columns[key].text(end) for end in ends)}]"

    headline = next((keys for keys in _HEADLINES if set(keys) <= set(row)), tuple(columns)[:2])
    count, sentences = len(record.row_ids), []
    if headline:
        sentences.append(f"On {count:,} test rows, {record.method} has {' and '.join(map(number, headline))}.")
    sentences += _calibration(record)
    if "ood_auroc" in columns:
        sentences.append(
            f"By its OOD score ({score_label(score).lower()}), it separates {len(record.outside['ood_score']):,} out-of-distribution rows from the test "
            f"rows with {number('ood_auroc')}, where 0.5 is chance and 1 is perfect."
        )
    if sentences:
        sentences.append(
            "Brackets are 95 % intervals over test rows. They hold for this trained module and further rows of the same kind, not for another training."
        )
        outside = [len(record.outside["ood_score"])] if record.outside else []
        sentences += few_rows(min([count, *outside]))
    return sentences


def _calibration(record: Record) -> list[str]:
    """Whether confidences or intervals agree with their coverage."""
    rows = record.rows
    if "confidence" in rows and "correct" in rows:
        lower, upper = mean_interval(rows["confidence"].double() - rows["correct"].double(), bound=1.0)
        gap = 50 * (lower + upper)
        text = f"On average, its confidence is {abs(gap):.1f} points {'above' if gap > 0 else 'below'} its accuracy"
        brackets = f"[{_signed(100 * lower)}, {_signed(100 * upper)}]"
        if lower <= 0 <= upper:
            return [f"{text} {brackets}, which is consistent with a calibrated module."]
        return [f"{text} {brackets}: it is {'overconfident' if gap > 0 else 'underconfident'}."]
    if "covered_90" in rows:
        covered = rows["covered_90"][~rows["covered_90"].isnan()]
        lower, upper = mean_interval(covered)
        text = f"Its 90 % intervals hold {100 * float(covered.mean()):.1f} % of the targets [{100 * lower:.1f}, {100 * upper:.1f}]"
        if lower <= 0.9 <= upper:
            return [f"{text}, which is consistent with 90 %."]
        return [f"{text}: they are too {'narrow' if upper < 0.9 else 'wide'}."]
    return []


def _signed(value: float) -> str:
    return number_text(value, "+.1f")
