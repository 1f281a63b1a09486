"""Files of predictions that grow batch by batch: tables (CSV, Parquet) or arrays (npz). The files of all ranks are read as one."""

import csv
import importlib
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

import numpy as np

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.writing import partial_path

Format = Literal["parquet", "csv", "npz"]
FORMATS: tuple[Format, ...] = ("parquet", "csv", "npz")
Block = dict[str, "np.ndarray[Any, Any]"]
"""Rows of predictions by name: [B], [B, ...] for several numbers per input, or maps [B, ..., *P]."""

FLUSH_BYTES = 2**24
"""Rows are written in blocks of this size, which bounds the memory and avoids tiny blocks."""

_NAME = re.compile(r"predictions(?:-loader(?P<loader>\d+))?-rank(?P<rank>\d+)\.(?P<format>parquet|csv|npz)")


def read_predictions(
    output_dir: str | Path,
    dataloader_idx: int = 0,
    format: Format | None = None,
    names: Sequence[str] | None = None,
) -> Block:
    """One table, sorted by ``index``, from the files that :class:`PredictionWriter` wrote on all ranks.

    Args:
        output_dir: Their directory.
        dataloader_idx: Index of the loader, if there were several.
        format: ``"parquet"``, ``"csv"`` or ``"npz"``, if the directory holds several.
        names: The columns to return; None returns all. From an npz file, only these are read.

    Returns:
        A column [N] for each name, in the order of the file; for npz files, an array [N, ...] for each name.

    Raises:
        InputError: The directory holds no such file, several formats, or files with different columns; or a column in ``names``
            does not exist.
    """
    found = {
        path: one
        for one in FORMATS
        for path, (loader, _) in named_files(Path(output_dir), one).items()
        if format in (None, one) and loader == dataloader_idx
    }
    if len(set(found.values())) != 1:
        came = f"them in the formats {' and '.join(sorted(set(found.values())))}: pass `format`" if found else "none"
        raise InputError(
            f"`output_dir` must hold predictions of loader {dataloader_idx}, but {output_dir} holds {came}."
        )
    wanted = None if names is None else ("index", *names)
    tables = [FILES[one].read(path, wanted) for path, one in sorted(found.items())]
    if any(list(table) != list(tables[0]) for table in tables):
        raise InputError(f"The files in {output_dir} have different columns.")
    missing = [name for name in names or () if name not in tables[0]]
    if missing:
        raise InputError(
            f"`names` must be columns of the files in {output_dir}, but they have no column {missing[0]!r}."
        )
    order = np.argsort(np.concatenate([table["index"] for table in tables]), kind="stable")
    kept = tables[0] if names is None else names
    return {name: np.concatenate([table.pop(name) for table in tables])[order] for name in list(kept)}


class PredictionFile(ABC):
    """A table or arrays that grow in a hidden file, which gets its final name when it is complete.

    Attributes:
        holds_maps: Whether the file takes numbers with more axes than [B, D].
    """

    holds_maps: ClassVar[bool] = False

    def __init__(self, path: Path, first: Block) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.rows = 0
        self._blocks: list[Block] = []
        self._kind = _kind(first)
        self.open(self.columns({name: values[:0] for name, values in first.items()}))

    def add(self, block: Block) -> None:
        """Buffer rows, and write the buffer when it is large enough."""
        kind = _kind(block)
        if kind != self._kind:
            changed = sorted(n for n in {*kind, *self._kind} if kind.get(n) != self._kind.get(n))
            shapes = [
                f"{n} {list(kind[n][1])}, before {list(self._kind[n][1])}"
                for n in changed
                if n in kind and n in self._kind
            ]
            raise InputError(
                f"All batches must have the same columns, but {', '.join(changed)} differ from the first batch's"
                + (f" (the shape of an input's {shapes[0]})." if shapes else ".")
            )
        self._blocks.append(block)
        self.rows += len(block["index"])
        if sum(values.nbytes for one in self._blocks for values in one.values()) >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._blocks:
            self.write(self.columns({n: np.concatenate([one[n] for one in self._blocks]) for n in self._blocks[0]}))
            self._blocks = []

    def columns(self, block: Block) -> Block:
        """The rows as they are written: one column [B] for each number."""
        return _columns(block)

    def close(self) -> None:
        """Write the remaining rows, and give the file its name."""
        self._flush()
        self.end()

    def discard(self) -> None:
        """Remove the file."""
        self._blocks = []
        try:
            self.end()
        finally:
            self.partial.unlink(missing_ok=True)

    @abstractmethod
    def open(self, empty: Block) -> None:
        """Open the file; ``empty`` has its columns and no rows."""

    @abstractmethod
    def write(self, columns: Block) -> None:
        """Write rows."""

    @abstractmethod
    def end(self) -> None:
        """Close the file; a second call does nothing."""

    @staticmethod
    @abstractmethod
    def read(path: Path, names: Sequence[str] | None = None) -> Block:
        """The columns of a file; only those in ``names``, if given."""


class CsvFile(PredictionFile):
    """A CSV file with a header."""

    _stream: TextIO

    def open(self, empty: Block) -> None:
        """Write the header."""
        self._stream = self.partial.open("w", newline="")
        csv.writer(self._stream).writerow(empty)

    def write(self, columns: Block) -> None:
        """Write rows."""
        # The shortest text that reads back as the same number in its precision.
        numbers = [values.astype(np.uint8) if values.dtype == bool else values for values in columns.values()]
        texts = [values.astype(str).tolist() for values in numbers]
        csv.writer(self._stream).writerows(zip(*texts, strict=True))

    def end(self) -> None:
        """Close the file."""
        self._stream.close()

    @staticmethod
    def read(path: Path, names: Sequence[str] | None = None) -> Block:
        """The columns of a file."""
        with path.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        whole = {"index": np.int64, "label": np.int64, "set_size": np.int64}
        found = {n: np.asarray(v, whole.get(n, np.float64)) for n, v in zip(header, columns, strict=True)}
        found |= {
            n: v.astype(bool) for n, v in found.items() if n.startswith(("prediction_set", "answered", "ood_alarm"))
        }
        return {n: v for n, v in found.items() if names is None or n in names}


class ParquetFile(PredictionFile):
    """A Parquet file with one row group per block."""

    _writer: Any

    def open(self, empty: Block) -> None:
        """Write the schema."""
        pyarrow, parquet = import_pyarrow()
        self._writer = parquet.ParquetWriter(self.partial, pyarrow.table(empty).schema)

    def write(self, columns: Block) -> None:
        """Write rows."""
        pyarrow, _ = import_pyarrow()
        self._writer.write_table(pyarrow.table(columns))

    def end(self) -> None:
        """Close the file."""
        self._writer.close()

    @staticmethod
    def read(path: Path, names: Sequence[str] | None = None) -> Block:
        """The columns of a file."""
        _, parquet = import_pyarrow()
        table = parquet.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names if names is None or name in names}


class NpzFile(PredictionFile):
    """An npz file for ``numpy.load``, with an array ``<name>/<block>`` for each name and each block of rows."""

    holds_maps: ClassVar[bool] = True
    _archive: zipfile.ZipFile

    def open(self, empty: Block) -> None:
        """Open the archive, and write a block without rows, which stores the names."""
        self._archive = zipfile.ZipFile(self.partial, "w")
        self._num_blocks = 0
        self.write(empty)

    def columns(self, block: Block) -> Block:
        """The rows, unchanged."""
        return block

    def write(self, columns: Block) -> None:
        """Write rows."""
        for name, values in columns.items():
            with self._archive.open(f"{name}/{self._num_blocks:06d}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)
        self._num_blocks += 1

    def end(self) -> None:
        """Write the table of contents."""
        self._archive.close()

    @staticmethod
    def read(path: Path, names: Sequence[str] | None = None) -> Block:
        """The arrays of a file."""
        with np.load(path) as archive:
            found: dict[str, list[str]] = {}
            for entry in archive.files:
                found.setdefault(entry.rpartition("/")[0], []).append(entry)
            wanted = [name for name in found if names is None or name in names]
            return {name: np.concatenate([archive[entry] for entry in found[name]]) for name in wanted}


FILES: Mapping[str, type[PredictionFile]] = {"parquet": ParquetFile, "csv": CsvFile, "npz": NpzFile}


def import_pyarrow(advice: str = "Or pass `format='csv'`.") -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Args:
        advice: End of the error message, with an alternative.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(f"Parquet files need pyarrow: pip install 'lightning-uq[parquet]'. {advice}") from error


def _kind(block: Block) -> dict[str, tuple[Any, ...]]:
    return {name: (values.dtype, values.shape[1:]) for name, values in block.items()}


def _columns(block: Block) -> Block:
    """One column [B] for each number."""
    columns: Block = {}
    for name, values in block.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            name = "prob" if name == "probs" else name
            places = np.ndindex(values.shape[1:])
            columns.update({"_".join([name, *map(str, at)]): values[(slice(None), *at)] for at in places})
    return columns


def named_files(directory: Path, format: str) -> dict[Path, tuple[int, int]]:
    """The files in a directory that are named like a writer's, with loader and rank."""
    found = {}
    for path in directory.glob(f"predictions*.{format}"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found[path] = int(match["loader"] or 0), int(match["rank"])
    return found
