"""The comparison's columns: what they are called, which direction is better, how a value is printed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
"""``{"method": name, key: {"mean": value, "se": value or None}, ...}``; a key that does not apply is absent."""


@dataclass(frozen=True)
class Column:
    """One column of the comparison.

    Attributes:
        key: Its key in ``results.json``.
        label: Its heading, short enough for a terminal.
        better: Whether a higher or a lower value is better; None where neither is, as of a coverage that should be met.
        group: Which table it is in where one does not fit.
        text: Prints a value.
        title: What it is, in full.
    """

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    group: Literal["prediction", "sets", "testbed", "detection", "cost"]
    text: Callable[[float], str]
    title: str


def _digits(decimals: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{decimals}f}"


COLUMNS: tuple[Column, ...] = (
    Column("accuracy", "Acc.", "higher", "prediction", _digits(3), "Accuracy"),
    Column("rmse", "RMSE", "lower", "prediction", _digits(3), "RMSE"),
    Column("mae", "MAE", "lower", "prediction", _digits(3), "MAE"),
    Column("crps", "CRPS", "lower", "prediction", _digits(3), "CRPS"),
    Column("interval_score_90", "IS", "lower", "prediction", _digits(3), "IS"),
    Column("coverage_90", "C90", None, "prediction", _digits(3), "C90"),
    Column("width_90", "W90", "lower", "prediction", _digits(3), "W90"),
    Column("nll", "NLL", "lower", "prediction", _digits(3), "Negative log-likelihood, nats"),
    Column("brier", "Brier", "lower", "prediction", _digits(3), "Brier score, summed over classes"),
    Column("ece", "ECE", "lower", "prediction", _digits(3), "Expected calibration error, 15 bins"),
    Column("joint_log_loss", "Joint", "lower", "prediction", _digits(3), "Joint log-loss of 10 inputs, dyadic, nats"),
    Column("coverage", "Cover", None, "sets", _digits(3), "Share of test labels in sets of classes fitted to a coverage of 90 %"),
    Column("set_size", "Size", "lower", "sets", _digits(2), "Mean number of classes in these sets"),
    Column("ood_auroc", "AUROC", "higher", "detection", _digits(3), "OOD detection: area under the ROC curve"),
    Column("ood_auprc_out", "AP out", "higher", "detection", _digits(3), "OOD detection: average precision, OOD positive"),
    Column("ood_auprc_in", "AP in", "higher", "detection", _digits(3), "OOD detection: average precision, in-dist. positive"),
    Column("ood_fpr95", "FPR95", "lower", "detection", _digits(3), "OOD detection: share of OOD kept where 95% of in-dist. is"),
    Column("parameters", "Params", "lower", "cost", _digits(0), "Weights, frozen ones included"),
    Column("train_seconds", "Train s", "lower", "cost", _digits(1), "Training time, seconds"),
    Column("ms_per_1000", "ms/1k", "lower", "cost", _digits(2), "Milliseconds per 1,000 predictions"),
)  # fmt: skip
"""The columns of any data, in their order; a table shows those that any of its rows has."""

TESTBED_COLUMNS: tuple[Column, ...] = (
    Column("kl_tau1", "KL 1", "lower", "testbed", _digits(3), "KL from the environment, 1 label, nats"),
    Column("kl_tau10", "KL 10", "lower", "testbed", _digits(3), "KL from the environment, 10 labels jointly, nats"),
    Column("kl_tau100", "KL 100", "lower", "testbed", _digits(2), "KL from the environment, 100 labels jointly, nats"),
    Column("kl_tau1_normalized", "KL 1/u", "lower", "testbed", _digits(3), "KL, 1 label, over the uniform agent's"),
    Column("kl_tau10_normalized", "KL 10/u", "lower", "testbed", _digits(3), "KL, 10 labels, over the uniform agent's"),
    Column("kl_tau100_normalized", "KL 100/u", "lower", "testbed", _digits(3), "KL, 100 labels, over the uniform agent's"),
    Column("kl_infinite", "Inf.", "lower", "testbed", _digits(0), "Infinite draws, counted as the largest finite one"),
)  # fmt: skip
"""What only the testbed has, between the predictions' columns and the others."""

RESULT_KEYS = tuple(column.key for column in COLUMNS)
_OF_PREDICTIONS = tuple(column for column in COLUMNS if column.group == "prediction")
ALL_COLUMNS = (*_OF_PREDICTIONS, *TESTBED_COLUMNS, *COLUMNS[len(_OF_PREDICTIONS) :])


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that at least one row has a value for."""
    return [column for column in ALL_COLUMNS if any(column.key in row for row in rows)]


def cell(row: Row, column: Column) -> tuple[str, str]:
    """A row's mean and standard error as printed; the error is empty with one seed, the mean is a dash where none is.

    Example:
        >>> row = {"method": "softmax", "accuracy": {"mean": 0.98, "se": 0.0031}}
        >>> cell(row, COLUMNS[0]), cell(row, COLUMNS[1])
        (('0.980', '±0.003'), ('-', ''))
    """
    value = row.get(column.key)
    if value is None or value["mean"] is None or not math.isfinite(value["mean"]):
        return "-", ""
    # A count does not vary with the seed, and a time with the machine more than with the seed.
    show_error = value["se"] is not None and column.group != "cost"
    return column.text(value["mean"]), f"±{column.text(value['se'])}" if show_error else ""


def best_methods(rows: Sequence[Row], column: Column) -> set[str]:
    """Methods whose printed mean is the column's best; none where all are equal, or where none is better.

    Example:
        >>> rows = [{"method": "a", "nll": {"mean": 0.2, "se": None}}, {"method": "b", "nll": {"mean": 0.3, "se": None}}]
        >>> best_methods(rows, COLUMNS[1])
        {'a'}
    """
    printed = {row["method"]: cell(row, column)[0] for row in rows}
    values = {row["method"]: row[column.key]["mean"] for row in rows if printed[row["method"]] != "-"}
    if not values or column.better is None:
        return set()
    best = (max if column.better == "higher" else min)(values, key=lambda method: values[method])
    winners = {method for method in values if printed[method] == printed[best]}
    return winners if len(winners) < len(values) else set()


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, the best means bold: what a README takes.

    Example:
        >>> print(markdown_table([{"method": "softmax", "nll": {"mean": 0.25, "se": 0.01}}]))
        | method | NLL |
        |---|---:|
        | softmax | 0.250 ±0.010 |
    """
    columns = shown_columns(rows)
    best = {column.key: best_methods(rows, column) for column in columns}
    lines = ["| method | " + " | ".join(column.label for column in columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            mean, error = cell(row, column)
            mean = f"**{mean}**" if row["method"] in best[column.key] else mean
            cells.append(f"{mean} {error}".strip())
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
