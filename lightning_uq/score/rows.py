"""The rows of a file, a piece at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_uq.errors import InputError

Array = np.ndarray[Any, Any]


class Piece(NamedTuple):
    """Some rows.

    Attributes:
        x: The input [n, ...].
        ids: The values [n] of the column that is copied, as objects, or None.
    """

    x: Array
    ids: Array | None


class Rows(ABC):
    """The rows of a file, in order.

    Attributes:
        columns: Names of the columns that make the input, or None if the file is an array.
        left_out: Number of columns of a table that are unused although no argument excludes them.
        total: The number of rows; None if it is unknown before all are read.
        id_type: pyarrow's type of the column that is copied, or None.
    """

    columns: Sequence[str] | None = None
    left_out: int = 0
    total: int | None = None
    id_type: Any = None

    @abstractmethod
    def pieces(self, size: int) -> Iterator[Piece]:
        """All rows, in pieces of at most ``size``.

        Raises:
            InputError: The file is damaged, or a value is no number.
        """


def open_rows(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    id: str | None = None,
    input: str | None = None,
    names: Sequence[str] = (),
) -> Rows:
    """The rows of a file.

    Args:
        path: A table, ``.csv`` or ``.parquet``, or an array [N, ...], ``.npy`` or ``.npz``.
        columns: For a table: the columns that make the input, in the order that the model expects; None for ``names``, or without them for all but ``drop``
            and ``id``.
        drop: For a table: columns that the model does not take.
        id: For a table: a column that is copied into the output, and is no part of the input unless ``columns`` names it.
        input: For an ``.npz``: the name of the array; None for ``x``.
        names: The columns that the model names itself, in its order; empty where it names none.

    Raises:
        InputError: The file cannot be read, an argument does not belong to this kind of file, or a column is missing or not numeric.
        MissingExtraError: A table without pyarrow.
    """
    from lightning_uq.score.arrays import ArrayRows
    from lightning_uq.score.tables import CsvRows, ParquetRows

    path = Path(path)
    tables = {".csv": CsvRows, ".parquet": ParquetRows}
    if path.suffix not in (*tables, ".npy", ".npz"):
        raise InputError(f"DATA must end in .csv, .parquet, .npy or .npz, but it is {path}.")
    if not path.is_file():
        raise InputError(f"DATA: {path} does not exist or is not a file.")
    if path.suffix in tables:
        if input is not None:
            raise InputError("`input` names an array of an .npz file. For a table, pass `columns`.")
        return tables[path.suffix](path, columns, drop, id, names)
    if columns is not None or drop or id is not None:
        raise InputError(f"`columns`, `drop` and `id` apply to tables only, and {path} is an array. Leave them out.")
    if path.suffix == ".npy" and input is not None:
        raise InputError(f"`input` names an array of an .npz file, but {path} holds one array. Leave it out.")
    return ArrayRows(path, input or "x")
