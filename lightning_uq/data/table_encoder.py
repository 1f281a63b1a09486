"""Encodes a table as features: numbers are standardized and categories are one-hot, by statistics of the training rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_uq.data.extremes import LIMIT, WHAT_TO_DO, extreme_row
from lightning_uq.data.table_columns import check_text, column_kind, levels_of, numbers, texts
from lightning_uq.data.table_files import passed
from lightning_uq.errors import InputError

MAX_LEVELS = 50
"""The largest number of levels of a category."""

Unseen = Literal["indicator", "error"]

Place = Callable[[Any], str]
"""Returns the place of a row in its file, such as ``"line 7"``, from its label in the index of a ``pandas.DataFrame``."""


@dataclass(frozen=True)
class Number:
    """A column of numbers: its mean and standard deviation (0 for a constant), and whether training rows miss values."""

    name: str
    mean: float
    std: float
    has_missing: bool

    @property
    def feature_names(self) -> list[str]:
        """The names of the column's features."""
        return [self.name] * (self.std > 0) + [f"{self.name}=missing"] * self.has_missing

    def encode(
        self, values: Any, unseen: np.ndarray[Any, Any], policy: Unseen, place: Place
    ) -> list[np.ndarray[Any, Any]]:
        """The column's features, each [N]; a missing value becomes the training mean."""
        found = numbers(self.name, values)
        missing = np.isnan(found)
        if missing.any() and not self.has_missing:
            if policy == "error":
                raise InputError(
                    f"Column `{self.name}` misses {int(missing.sum())} values, but it has no missing values in the training rows. Fill them, or remove "
                    "these rows."
                )
            unseen |= missing
        scaled = np.where(missing, 0.0, (found - self.mean) / (self.std or 1.0))
        if self.std and (far := np.abs(scaled) > LIMIT).any():
            row = int(far.argmax())
            raise InputError(
                f"Column `{self.name}` holds {found[row]:g} in {place(values.index[row])}, more than {LIMIT:.0e} standard deviations of the "
                f"training rows from their mean. {WHAT_TO_DO}"
            )
        return [scaled] * (self.std > 0) + [missing] * self.has_missing


@dataclass(frozen=True)
class Category:
    """A column of categories: its levels in the training rows, and whether these rows miss values, which count as a level."""

    name: str
    levels: tuple[str, ...]
    has_missing: bool

    @property
    def feature_names(self) -> list[str]:
        """The names of the column's features."""
        return [f"{self.name}={level}" for level in (*self.levels, *["missing"] * self.has_missing)]

    def encode(
        self, values: Any, unseen: np.ndarray[Any, Any], policy: Unseen, place: Place
    ) -> list[np.ndarray[Any, Any]]:
        """The column's features, each [N]; all are 0 for a level that is not in the training rows."""
        found = texts(values)
        levels: list[str | None] = [*self.levels, *[None] * self.has_missing]
        features = [found == level for level in levels]
        new = ~np.logical_or.reduce(features)
        if new.any() and policy == "error":
            level = found[new][0]
            what = "a missing value" if level is None else f"level {level!r}"
            raise InputError(
                f"Column `{self.name}` holds {what} in {int((found == level).sum())} rows, which is not in the training rows. Correct it, or "
                f"pass {passed(unseen='indicator')}."
            )
        unseen |= new
        return features


@dataclass(frozen=True)
class TableEncoder:
    """Encodes a table as features; consists of plain data.

    Attributes:
        columns: The columns that become features.
        unseen: ``"indicator"`` appends a feature that is 1 in rows with anything that is not in the training rows.
        constant: Names of columns that are left out because they are constant in the training rows.
        empty: Names of columns that are left out because they have no value in the training rows.
    """

    columns: tuple[Number | Category, ...]
    unseen: Unseen
    constant: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        train: Any,
        names: Sequence[str],
        categorical: Sequence[str],
        unseen: Unseen,
        place: Place = "row {}".format,
    ) -> "TableEncoder":
        """The encoder of columns ``names``, fitted to the training rows only.

        Raises:
            InputError: A column cannot be encoded; the message names it and says what to do.
        """
        columns = [_fit_column(name, train[name], name in categorical, place) for name in names]
        kept = [column for column in columns if _is_informative(column)]
        if not kept:
            raise InputError(
                "The table needs a feature that varies in the training rows, but all columns are constant."
            )
        left_out = [column.name for column in columns if column not in kept]
        empty = tuple(name for name in left_out if train[name].isna().all())
        return cls(tuple(kept), unseen, tuple(name for name in left_out if name not in empty), empty)

    @property
    def feature_names(self) -> list[str]:
        """Names of the features, in order."""
        names = [name for column in self.columns for name in column.feature_names]
        return names + ["unseen"] * (self.unseen == "indicator")

    @property
    def is_numeric(self) -> bool:
        """Whether all columns hold numbers."""
        return all(isinstance(column, Number) for column in self.columns)

    def missing_rows(self, frame: Any) -> Any:
        """The mask [N] of the rows with a missing value in an encoded column. A column that the frame lacks counts as complete."""
        names = [column.name for column in self.columns if column.name in frame.columns]
        return frame[names].isna().any(axis=1).to_numpy()

    def transform(self, frame: Any, place: Place = "row {}".format) -> Tensor:
        """Features [N, d] in float32.

        Args:
            frame: The rows.
            place: Returns the place of a row, for errors.

        Raises:
            InputError: A column is missing or has invalid values.
        """
        absent = [column.name for column in self.columns if column.name not in frame.columns]
        if absent:
            raise InputError(
                f"The table must have the columns of the training table, but it lacks {', '.join(f'`{name}`' for name in absent)}."
            )
        unseen = np.zeros(len(frame), dtype=bool)
        features: list[np.ndarray[Any, Any]] = []
        for column in self.columns:
            features += column.encode(frame[column.name], unseen, self.unseen, place)
        if self.unseen == "indicator":
            features.append(unseen)
        return torch.from_numpy(np.stack(features, 1).astype(np.float32))

    def state(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and strings."""
        columns = [{**asdict(column), "kind": type(column).__name__} for column in self.columns]
        for column in columns:
            if "levels" in column:
                column["levels"] = list(column["levels"])
        left_out = {"constant": list(self.constant), "empty": list(self.empty)}
        return {"columns": columns, "unseen": self.unseen, **left_out}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TableEncoder":
        """The encoder with this :meth:`state`."""
        columns: list[Number | Category] = []
        for given in state["columns"]:
            fields = {name: value for name, value in given.items() if name != "kind"}
            if given["kind"] == "Number":
                columns.append(Number(**fields))
            else:
                columns.append(Category(**{**fields, "levels": tuple(fields["levels"])}))
        return cls(tuple(columns), state["unseen"], tuple(state["constant"]), tuple(state["empty"]))


def _fit_column(name: str, values: Any, is_categorical: bool, place: Place) -> Number | Category:
    kind = column_kind(name, values)
    has_missing = bool(values.isna().any())
    if kind == "empty" or (kind in ("integers", "floats") and not is_categorical):
        found = numbers(name, values)
        check_extreme(name, found, values.index, place)
        found = found[~np.isnan(found)]
        mean, std = (float(found.mean()), float(found.std())) if len(found) else (0.0, 0.0)
        return Number(name, mean, std if std > 1e-12 * abs(mean) else 0.0, has_missing and len(found) > 0)
    levels = levels_of(values)
    num = int(values.notna().sum())
    if kind == "strings" and not is_categorical:
        check_text(name, values)
    if kind == "strings" and len(levels) == num > 2:
        raise InputError(
            f"Column `{name}` holds a different text in each of the {num} training rows, like ids and names do, so nothing can be "
            f"learned from it. To leave it out, pass {passed(drop=[name])}."
        )
    if len(levels) > MAX_LEVELS:
        raise InputError(
            f"Column `{name}` has {len(levels)} levels in the training rows, more than {MAX_LEVELS}. Group rare levels, hash them into "
            f"fewer, or leave the column out with {passed(drop=[name])}."
        )
    return Category(name, tuple(levels), has_missing)


def check_extreme(name: str, found: np.ndarray[Any, np.dtype[np.float64]], index: Any, place: Place) -> None:
    """Raise if one value dominates the scale of a column.

    Args:
        name: The column.
        found: Its numbers [N].
        index: The labels of its rows.
        place: Returns the place of a row.

    Raises:
        InputError: There is such a value; the message names it and its row.
    """
    row = extreme_row(found)
    if row is not None:
        raise InputError(
            f"Column `{name}` holds {found[row]:g} in {place(index[row])}, more than {LIMIT:.0e} times as far from the median "
            f"({np.nanmedian(found):g}) as the other values are. {WHAT_TO_DO} If it marks a missing value, pass "
            f"{passed(na_values=[f'{found[row]:.17g}'])}."
        )


def _is_informative(column: Number | Category) -> bool:
    if isinstance(column, Number):
        return bool(column.feature_names)
    return len(column.feature_names) > 1
