"""Tables, CSV and Parquet, read block by block with pyarrow."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lightning_uq.callbacks.prediction_files import import_pyarrow
from lightning_uq.errors import InputError
from lightning_uq.score.rows import Array, Piece, Rows

_BLOCK_BYTES = 2**20


class TableRows(Rows):
    """The numeric columns of a table as rows [n, D] of float64: a missing value is NaN, true is 1.

    Args:
        path: The file.
        columns: The columns of the input, in order; None for ``names``, or without them for all but ``drop`` and ``id``.
        drop: Columns that are left out.
        id: A column that is copied.
        names: The columns that the model names itself, in its order.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] | None,
        drop: Sequence[str],
        id: str | None,
        names: Sequence[str] = (),
    ) -> None:
        self._path, self._id = path, id
        self._arrow, _ = import_pyarrow("`lightning-uq score` reads tables with it.")
        schema = self._read_schema()
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise InputError(f"{path} has two columns named {twice!r}. Rename one of them.")
        requested = {"columns": columns or (), "drop": drop, "id": () if id is None else (id,)}
        for argument, some in requested.items():
            missing = [name for name in some if name not in schema.names]
            if missing:
                raise InputError(
                    f"`{argument}`: {path} has no column {missing[0]!r}. Its columns are {', '.join(schema.names)}."
                )
        if columns is not None and drop:
            raise InputError("Pass either `columns` or `drop`: `columns` already excludes all other columns.")
        if columns:
            _check_places(columns, names)
        elif names:
            self._check_names(names, schema.names, drop)
        self.columns = list(columns or names) or [name for name in schema.names if name not in (*drop, id)]
        self.left_out = len(set(schema.names) - {*self.columns, *drop, id})
        others = [name for name in self.columns if not self._is_numeric(schema.field(name).type)]
        if others:
            texts = ", ".join(f"{name!r} ({schema.field(name).type})" for name in others)
            raise InputError(
                f"These columns of {path} are not numeric: {texts}. Exclude them with `drop`, copy one with `id`, or convert them to numbers."
            )
        if not self.columns:
            raise InputError(f"No column of {path} is left for the model.")
        self._types = {name: schema.field(name).type for name in self.columns}
        if id is not None:
            self.id_type = self._type_of_id(schema.field(id).type)

    def _check_names(self, names: Sequence[str], found: Sequence[str], drop: Sequence[str]) -> None:
        """Raise an error for a table that lacks a column of the model."""
        missing = [name for name in names if name not in found]
        if missing:
            lacks = ", ".join(map(repr, missing[:12])) + (", ..." if len(missing) > 12 else "")
            raise InputError(
                f"The model needs {len(names)} named columns, but {self._path} lacks {lacks}. Its columns are {', '.join(found)}."
            )
        dropped = [name for name in names if name in drop]
        if dropped:
            raise InputError(f"`drop` must not name {dropped[0]!r}, which the model needs.")

    def pieces(self, size: int) -> Iterator[Piece]:
        """All rows, in pieces of at most ``size``."""
        try:
            for block in self._blocks():
                for start in range(0, block.num_rows, size):
                    piece = block.slice(start, size)
                    x = np.stack([self._numbers(piece.column(name)) for name in self.columns or ()], 1)
                    yield Piece(x, None if self._id is None else _objects(piece.column(self._id)))
        except self._arrow.ArrowException as error:
            raise InputError(f"{self._path} cannot be read: {str(error).partition(chr(10))[0]}") from error

    def _numbers(self, column: Any) -> Array:
        numbers: Array = column.cast(self._arrow.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers

    def _is_numeric(self, kind: Any) -> bool:
        types = self._arrow.types
        tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
        return any(test(kind) for test in tests)

    def _type_of_id(self, kind: Any) -> Any:
        return kind.value_type if self._arrow.types.is_dictionary(kind) else kind

    def _columns_to_read(self) -> list[str]:
        return list(dict.fromkeys([*(self.columns or ()), *(() if self._id is None else (self._id,))]))

    @abstractmethod
    def _read_schema(self) -> Any:
        """Names and types of the columns."""

    @abstractmethod
    def _blocks(self) -> Iterator[Any]:
        """pyarrow's record batches of the columns to read."""


class ParquetRows(TableRows):
    """A Parquet file, of which a part of a row group is in memory."""

    def _read_schema(self) -> Any:
        with self._opened() as file:
            self.total = file.metadata.num_rows
            return file.schema_arrow

    def _blocks(self) -> Iterator[Any]:
        with self._opened() as file:
            yield from file.iter_batches(batch_size=2**14, columns=self._columns_to_read())

    def _opened(self) -> Any:
        _, parquet = import_pyarrow()
        try:
            return parquet.ParquetFile(self._path, pre_buffer=False, buffer_size=_BLOCK_BYTES)
        except self._arrow.ArrowException as error:
            raise InputError(f"{self._path} cannot be read as Parquet: {error}") from error


class CsvRows(TableRows):
    """A CSV file with a line of column names. Numbers are decimal; the column that is copied stays the text that is there."""

    def _read_schema(self) -> Any:
        with self._opened() as reader:
            schema = reader.schema
        if _are_numbers(schema.names):
            raise InputError(
                f"The first line of {self._path} must hold the column names, but it holds numbers: {', '.join(schema.names[:3])}."
            )
        return schema

    def _blocks(self) -> Iterator[Any]:
        is_boolean = self._arrow.types.is_boolean
        kinds = {name: kind if is_boolean(kind) else self._arrow.float64() for name, kind in self._types.items()}
        if self._id is not None:
            kinds[self._id] = self.id_type
        with self._opened(column_types=kinds, include_columns=self._columns_to_read()) as reader:
            yield from reader

    def _type_of_id(self, kind: Any) -> Any:
        if self._id in self._types:
            raise InputError(
                f"`id` of a CSV file is copied as text, so column {self._id!r} cannot be one of `columns` too."
            )
        return self._arrow.string()

    def _opened(self, **conversion: Any) -> Any:
        from pyarrow import csv

        try:
            return csv.open_csv(
                self._path,
                csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),  # whose errors name the row
                convert_options=csv.ConvertOptions(**conversion),
            )
        except self._arrow.ArrowException as error:
            raise InputError(f"{self._path} cannot be read as CSV: {str(error).partition(chr(10))[0]}") from error


def _check_places(columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise an error if columns that the model names are in another order. Other names are allowed: a table may name its columns differently."""
    for place, name in enumerate(columns):
        if name in names and names.index(name) != place:
            raise InputError(
                f"`columns` must keep the model's order, but {name!r} is column {place} instead of {names.index(name)} (counted from 0). Leave "
                "`columns` out, and the model finds its columns by name."
            )


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether names are the numbers of a first row: 0, 1, 2 ... is how a table without names is written."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return False
    return any(later - one != 1 for one, later in pairwise(numbers)) or not numbers[0].is_integer()


def _objects(column: Any) -> Array:
    return np.fromiter(column.to_pylist(), dtype=object, count=len(column))
