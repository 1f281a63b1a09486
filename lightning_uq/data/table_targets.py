"""Reads the targets of a table and their task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_uq.data.arrays import MAX_CLASSES, may_be_labels
from lightning_uq.data.interface import TaskName
from lightning_uq.data.table_columns import check_text, column_kind, levels_of, numbers, texts
from lightning_uq.data.table_encoder import Place, check_extreme
from lightning_uq.data.table_files import passed
from lightning_uq.errors import InputError


@dataclass(frozen=True)
class TableTargets:
    """Targets of all rows.

    Attributes:
        values: Labels [N], or [N, L] for a multilabel task, in int64; numbers [N, D] in float32.
        names: Names of the labels [N], in order; None for other targets.
        task: The task.
        is_doubtful: Whether the values also look like those of the other task.
    """

    values: Tensor
    names: Mapping[int, Any] | None
    task: TaskName
    is_doubtful: bool


def read_targets(
    frame: Any, columns: tuple[str, ...], task: TaskName | None, place: Place = "row {}".format
) -> TableTargets:
    """The targets in the target columns.

    Text, booleans and integers with at most 20 values are classes, and other numbers are regressed. Several columns of booleans, or of
    integers 0 and 1, are the labels of a multilabel task. ``task`` overrides this.

    Args:
        frame: The rows.
        columns: The target columns.
        task: The task, if given.
        place: Returns the place of a row, for errors.

    Raises:
        InputError: A target is missing or not finite, or does not match the task.
    """
    for name in columns:
        missing = frame[name].isna()
        if missing.any():
            raise InputError(
                f"Every row needs a target, but column `{name}` misses {int(missing.sum())} of {len(frame)}, the first in "
                f"{place(missing.idxmax())}. Remove these rows. If the text NA or None is the name of a class, pass {passed(keep_default_na=False)}."
            )
    found = task or _guess(columns, frame)
    if found == "regression":
        return _regression(frame, columns, place)
    if found == "multilabel":
        return _multilabel(frame, columns)
    if len(columns) > 1:
        raise InputError(
            f"task={found!r} needs one target column, but `target` names {len(columns)}. For several labels per row, pass task='multilabel'."
        )
    return _classification(columns[0], frame[columns[0]], found)


def _guess(columns: tuple[str, ...], frame: Any) -> TaskName:
    kinds = {column_kind(name, frame[name]) for name in columns}
    if len(columns) > 1:
        are_flags = kinds <= {"integers", "booleans"} and bool(frame[list(columns)].isin([0, 1]).all(axis=None))
        return "multilabel" if are_flags else "regression"
    (kind,) = kinds
    values = frame[columns[0]]
    if kind == "strings":
        check_text(columns[0], values)
    is_few = kind == "integers" and values.nunique() <= MAX_CLASSES
    return "classification" if is_few or kind in ("strings", "booleans", "categories") else "regression"


def _multilabel(frame: Any, columns: tuple[str, ...]) -> TableTargets:
    for name in columns:
        other = frame[name][~frame[name].isin([0, 1])]
        if len(other):
            raise InputError(
                f"task='multilabel' needs labels 0 and 1, or booleans, but column `{name}` holds {other.iloc[0]!r}."
            )
    values = torch.from_numpy(frame[list(columns)].to_numpy().astype(np.int64))
    return TableTargets(values, None, "multilabel", False)


def _regression(frame: Any, columns: tuple[str, ...], place: Place) -> TableTargets:
    found = []
    for name in columns:
        kind = column_kind(name, frame[name])
        if kind not in ("integers", "floats", "booleans"):
            if kind == "strings":
                check_text(name, frame[name])
            raise InputError(f"Column `{name}` must hold numbers to be regressed, but it holds {kind}.")
        found.append(numbers(name, frame[name]))
        check_extreme(name, found[-1], frame.index, place)
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.stack(found, 1).astype(np.float32))
    if not bool(values.isfinite().all()):
        raise InputError(f"The targets in {', '.join(columns)} must be finite in float32. Change their unit.")
    is_doubtful = len(columns) == 1 and may_be_labels(found[0])
    return TableTargets(values, None, "regression", is_doubtful)


def _classification(name: str, values: Any, task: TaskName) -> TableTargets:
    kind = column_kind(name, values)
    if kind in ("integers", "floats"):
        found = numbers(name, values)
        if not (found == found.round()).all():
            raise InputError(
                f"Column `{name}` must hold class labels, but it holds numbers such as {found[found != found.round()][0]}."
            )
        labels = found.astype(np.int64)
        return TableTargets(
            torch.from_numpy(labels), {label: label for label in sorted(set(labels.tolist()))}, task, False
        )
    levels = levels_of(values)
    place = {level: label for label, level in enumerate(levels)}
    labels = np.array([place[text] for text in texts(values)], dtype=np.int64)
    return TableTargets(torch.from_numpy(labels), dict(enumerate(levels)), task, False)
