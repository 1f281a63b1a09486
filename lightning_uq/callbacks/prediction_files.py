"""The files of predictions: tables that grow batch by batch, as CSV or Parquet, and one table read back from all ranks."""

import csv
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.writing import partial_path

Format = Literal["parquet", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "csv")
Block = dict[str, "np.ndarray[Any, Any]"]
"""Some rows: the numbers [B] of each name, or [B, ...] if an input has several."""

FLUSH_BYTES = 2**24
"""Rows are written in blocks of this size, so that memory stays bounded and blocks do not get tiny."""

_NAME = re.compile(r"predictions(?:-loader(?P<loader>\d+))?-rank(?P<rank>\d+)\.(?P<format>parquet|csv)")


def read_predictions(output_dir: str | Path, dataloader_idx: int = 0, format: Format | None = None) -> Block:
    """One table from the files of all ranks that :class:`PredictionWriter` wrote, sorted by ``index``.

    Args:
        output_dir: Their directory.
        dataloader_idx: Which loader's, where there were several.
        format: ``"parquet"`` or ``"csv"``, where the directory holds both.

    Returns:
        A column [N] for each name, in the order of the file.

    Raises:
        InputError: The directory holds no such file, both formats, or files with different columns.
    """
    found = {
        path: one
        for one in FORMATS
        for path, (loader, _) in named_files(Path(output_dir), one).items()
        if format in (None, one) and loader == dataloader_idx
    }
    if len(set(found.values())) != 1:
        came = "them in both formats: pass `format`" if found else "none"
        raise InputError(
            f"`output_dir` must hold predictions of loader {dataloader_idx}, but {output_dir} holds {came}."
        )
    tables = [FILES[one].read(path) for path, one in sorted(found.items())]
    if any(list(table) != list(tables[0]) for table in tables):
        raise InputError(f"The files in {output_dir} must have the same columns, but they differ.")
    whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    order = np.argsort(whole["index"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


class TableFile(ABC):
    """A table that grows in a hidden file beside its own name, and takes the name when it is complete."""

    def __init__(self, path: Path, first: Block) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.rows = 0
        self._blocks: list[Block] = []
        self._kind = _kind(first)
        self.open(_columns({name: values[:0] for name, values in first.items()}))

    def add(self, block: Block) -> None:
        """Keep some rows, and write what was kept once it is large."""
        kind = _kind(block)
        if kind != self._kind:
            changed = sorted(n for n in {*kind, *self._kind} if kind.get(n) != self._kind.get(n))
            raise InputError(
                f"All batches must have the same columns, but {', '.join(changed)} differ from the first batch's."
            )
        self._blocks.append(block)
        self.rows += len(block["index"])
        if sum(values.nbytes for one in self._blocks for values in one.values()) >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._blocks:
            self.write(_columns({n: np.concatenate([one[n] for one in self._blocks]) for n in self._blocks[0]}))
            self._blocks = []

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self.end()

    def discard(self) -> None:
        """Remove what was written."""
        self._blocks = []
        try:
            self.end()
        finally:
            self.partial.unlink(missing_ok=True)

    @abstractmethod
    def open(self, empty: Block) -> None:
        """Begin the file; ``empty`` has its columns and no rows."""

    @abstractmethod
    def write(self, columns: Block) -> None:
        """Write some rows."""

    @abstractmethod
    def end(self) -> None:
        """Close the file; a second time does nothing."""

    @staticmethod
    @abstractmethod
    def read(path: Path) -> Block:
        """The columns of a file."""


class CsvFile(TableFile):
    """A CSV file with a header."""

    _stream: TextIO

    def open(self, empty: Block) -> None:
        """Write the header."""
        self._stream = self.partial.open("w", newline="")
        csv.writer(self._stream).writerow(empty)

    def write(self, columns: Block) -> None:
        """Write some rows."""
        # A float's shortest text that reads back as the same number of its own precision.
        texts = [values.astype(str).tolist() for values in columns.values()]
        csv.writer(self._stream).writerows(zip(*texts, strict=True))

    def end(self) -> None:
        """Close the file."""
        self._stream.close()

    @staticmethod
    def read(path: Path) -> Block:
        """The columns of a file."""
        with path.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        whole = {"index": np.int64, "label": np.int64}
        return {n: np.asarray(v, whole.get(n, np.float64)) for n, v in zip(header, columns, strict=True)}


class ParquetFile(TableFile):
    """A Parquet file, one row group for each block."""

    _writer: Any

    def open(self, empty: Block) -> None:
        """Write the schema."""
        pyarrow, parquet = import_pyarrow()
        self._writer = parquet.ParquetWriter(self.partial, pyarrow.table(empty).schema)

    def write(self, columns: Block) -> None:
        """Write some rows."""
        pyarrow, _ = import_pyarrow()
        self._writer.write_table(pyarrow.table(columns))

    def end(self) -> None:
        """Close the file."""
        self._writer.close()

    @staticmethod
    def read(path: Path) -> Block:
        """The columns of a file."""
        _, parquet = import_pyarrow()
        table = parquet.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}


FILES: Mapping[str, type[TableFile]] = {"parquet": ParquetFile, "csv": CsvFile}


def import_pyarrow() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        MissingExtraError: They are not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(
            "Parquet files need pyarrow: pip install 'lightning-uq[parquet]'. Or pass `format='csv'`."
        ) from error


def _kind(block: Block) -> dict[str, tuple[Any, ...]]:
    return {name: (values.dtype, values.shape[1:]) for name, values in block.items()}


def _columns(block: Block) -> Block:
    """One column [B] for each number."""
    columns: Block = {}
    for name, values in block.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            places = np.ndindex(values.shape[1:])
            columns.update({"_".join([name, *map(str, at)]): values[(slice(None), *at)] for at in places})
    return columns


def named_files(directory: Path, format: str) -> dict[Path, tuple[int, int]]:
    """The files in a directory that have a writer's name, with loader and rank."""
    found = {}
    for path in directory.glob(f"predictions*.{format}"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found[path] = int(match["loader"] or 0), int(match["rank"])
    return found
