"""The comparison's columns: what they are called, which direction is better, how a value is printed."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_uq.errors import InputError

Row = Mapping[str, Any]
"""``{"method": name, key: {"mean": value, "se": value or None}, ...}``; a key that does not apply is absent."""

Tied = Mapping[str, Collection[str] | None]
"""For each key the methods that cannot be distinguished from the best one; None: unknown."""

Mark = Literal["best", "tied"]


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
        in_units: Whether it is in the target's units, so that :func:`shown_columns` chooses the number of decimals.
    """

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    group: Literal["prediction", "sets", "intervals", "testbed", "detection", "cost"]
    text: Callable[[float], str]
    title: str
    in_units: bool = False


MINUS = "\N{MINUS SIGN}"


def number_text(value: float, spec: str) -> str:
    """A number as every table, page and sentence prints it: with a true minus sign, as figures have it.

    Example:
        >>> number_text(-1234.5, ",.2f")
        '−1,234.50'
    """
    return format(value, spec).replace("-", MINUS)


def _digits(decimals: int) -> Callable[[float], str]:
    return lambda value: number_text(value, f",.{decimals}f" if abs(value) < _LARGE else ".2e")


_LARGE = 1e7
"""From here on, a number that is no count is printed with an exponent."""


COLUMNS: tuple[Column, ...] = (
    Column("accuracy", "Acc.", "higher", "prediction", _digits(3), "Accuracy"),
    Column("subset_accuracy", "Exact", "higher", "prediction", _digits(3), "Share of inputs with all labels right"),
    Column("hamming", "Hamming", "lower", "prediction", _digits(3), "Hamming loss: share of wrong labels"),
    Column("auroc", "ROC", "higher", "prediction", _digits(3), "Area under the ROC curve of the label 1; of several labels the mean"),
    Column("average_precision", "AP", "higher", "prediction", _digits(3), "Average precision of the label 1; of several labels the mean"),
    Column("iou", "IoU", "higher", "prediction", _digits(3), "Mean intersection over union of the classes"),
    Column("rmse", "RMSE", "lower", "prediction", _digits(3), "Root mean squared error, in the target's units", True),
    Column("mae", "MAE", "lower", "prediction", _digits(3), "Mean absolute error, in the target's units", True),
    Column("nll", "NLL", "lower", "prediction", _digits(3), "Negative log-likelihood, nats"),
    Column("crps", "CRPS", "lower", "prediction", _digits(3), "Continuous ranked probability score, in the target's units", True),
    Column("brier", "Brier", "lower", "prediction", _digits(3), "Brier score, summed over classes"),
    Column("ece", "ECE", "lower", "prediction", _digits(3), "Expected calibration error, 15 bins"),
    Column("joint_log_loss", "Joint", "lower", "prediction", _digits(3), "Joint log-loss of 10 inputs, dyadic, nats"),
    Column("coverage", "Cover", None, "sets", _digits(3), "Share of test labels in sets of classes fitted to a coverage of 90 %"),
    Column("set_size", "Size", None, "sets", _digits(2), "Mean number of classes in these sets"),
    Column("coverage_90", "Cov 90", None, "intervals", _digits(3), "Share of targets in the central 90 % interval"),
    Column("width_90", "Width 90", None, "intervals", _digits(3), "Mean width of that interval, in the target's units", True),
    Column("interval_score", "Int. score", "lower", "intervals", _digits(3), "Interval score of the central 90 % interval, in the target's units", True),
    Column("ood_auroc", "AUROC", "higher", "detection", _digits(3), "OOD detection: area under the ROC curve"),
    Column("ood_auprc_out", "AP out", "higher", "detection", _digits(3), "OOD detection: average precision, OOD positive"),
    Column("ood_auprc_in", "AP in", "higher", "detection", _digits(3), "OOD detection: average precision, in-dist. positive"),
    Column("ood_fpr95", "FPR95", "lower", "detection", _digits(3), "OOD detection: share of OOD kept where 95 % of in-dist. is"),
    Column("parameters", "Params", "lower", "cost", "{:,.0f}".format, "Weights, frozen ones included"),
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
_PREDICTION_COLUMNS = tuple(column for column in COLUMNS if column.group == "prediction")
ALL_COLUMNS = (*_PREDICTION_COLUMNS, *TESTBED_COLUMNS, *COLUMNS[len(_PREDICTION_COLUMNS) :])


DENSITY_TITLES = {"nll": "Negative log-likelihood of the density, nats; it may be negative"}
"""Titles for :func:`shown_columns` where a column means something else for regression."""

LABEL_TITLES = {
    "nll": "Negative log-likelihood per label, nats",
    "brier": "Brier score per label",
    "ece": "Expected calibration error of a label's probability, 15 bins, mean over labels",
}
"""Titles for :func:`shown_columns` where a column means something else for several labels per input."""


def shown_columns(rows: Sequence[Row], titles: Mapping[str, str] | None = None) -> list[Column]:
    """The columns that at least one row has a value for.

    Columns in the target's units get as many decimals as show three digits of the largest mean.

    Args:
        rows: The rows.
        titles: Titles that replace those of the columns, by key; for regression, :data:`DENSITY_TITLES`, for several labels, :data:`LABEL_TITLES`.

    Example:
        >>> rows = [{"method": "softmax", "rmse": {"mean": 53.218, "se": None}}]
        >>> [column.text(53.218) for column in shown_columns(rows)]
        ['53.2']
    """
    shown = [column for column in ALL_COLUMNS if any(column.key in row for row in rows)]
    shown = [replace(column, title=(titles or {}).get(column.key, column.title)) for column in shown]
    return [replace(one, text=_text_in_units(rows, one.key)) if one.in_units else one for one in shown]


def _text_in_units(rows: Sequence[Row], key: str) -> Callable[[float], str]:
    means = [abs(row[key]["mean"]) for row in rows if key in row and row[key]["mean"] is not None]
    largest = max(filter(math.isfinite, means), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    fits = 1e-6 <= largest < _LARGE or not largest
    return _digits(max(0, 2 - exponent)) if fits else (lambda value: number_text(value, ".2e"))


def cell(row: Row, column: Column) -> tuple[str, str]:
    """A row's mean and standard error as printed; the error is empty with one seed, the mean is a dash where none is.

    Example:
        >>> row = {"method": "softmax", "accuracy": {"mean": 0.98, "se": 0.0031}}
        >>> accuracy, nll = shown_columns([row, {"method": "other", "nll": {"mean": 0.1, "se": None}}])
        >>> cell(row, accuracy), cell(row, nll)
        (('0.980', '±0.003'), ('-', ''))
    """
    value = row.get(column.key)
    if value is None or value["mean"] is None or not math.isfinite(value["mean"]):
        return "-", ""
    # A count does not vary with the seed, and a time with the machine more than with the seed.
    show_error = value["se"] is not None and column.group != "cost"
    return column.text(value["mean"]), f"±{column.text(value['se'])}" if show_error else ""


def best_methods(rows: Sequence[Row], column: Column) -> set[str]:
    """Methods whose printed mean is the column's best; none where a single one has a value, or where neither direction is better.

    Example:
        >>> rows = [{"method": "a", "nll": {"mean": 0.2, "se": None}}, {"method": "b", "nll": {"mean": 0.3, "se": None}}]
        >>> best_methods(rows, shown_columns(rows)[0])
        {'a'}
    """
    printed = {row["method"]: cell(row, column)[0] for row in rows}
    values = {row["method"]: row[column.key]["mean"] for row in rows if printed[row["method"]] != "-"}
    if len(values) < 2 or column.better is None:
        return set()
    best = (max if column.better == "higher" else min)(values, key=lambda method: values[method])
    return {method for method in values if printed[method] == printed[best]}


def marks(rows: Sequence[Row], columns: Sequence[Column], tied: Tied | None = None) -> dict[tuple[str, str], Mark]:
    """How the cells of a table are marked, by method and key; cells without a mark are absent.

    Args:
        rows: The rows.
        columns: The columns.
        tied: For each key the methods that cannot be distinguished from the best, or None where that is unknown.

    Returns:
        ``"best"`` for the best mean, ``"tied"`` for the other methods of ``tied``. A column with ``better=None`` has neither.

    Raises:
        InputError: ``tied`` names a method that has no row.

    Example:
        >>> rows = [{"method": name, "nll": {"mean": mean, "se": None}} for name, mean in (("a", 0.2), ("b", 0.3), ("c", 0.9))]
        >>> marks(rows, shown_columns(rows), {"nll": {"a", "b"}})
        {('a', 'nll'): 'best', ('b', 'nll'): 'tied'}
    """
    methods = {row["method"] for row in rows}
    found: dict[tuple[str, str], Mark] = {}
    for column in columns:
        candidates = (tied or {}).get(column.key) or ()
        unknown = sorted(set(candidates) - methods)
        if unknown:
            raise InputError(f"`tied[{column.key!r}]` names methods that have no row: {', '.join(unknown)}.")
        best = best_methods(rows, column)
        for row in rows:
            name = row["method"]
            if name in best:
                found[name, column.key] = "best"
            elif name in candidates and column.better is not None and cell(row, column)[0] != "-":
                found[name, column.key] = "tied"
    return found
