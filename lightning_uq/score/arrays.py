"""Arrays [N, ...] of ``.npy`` and ``.npz`` files, read from start to end, compressed or not."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_uq.errors import InputError
from lightning_uq.score.rows import Array, Piece, Rows

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayRows(Rows):
    """An array of numbers, read in pieces so that only one piece is in memory.

    An array in Fortran order is memory-mapped from an ``.npy``, and raises an error in an ``.npz``.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        with self._opened() as (_, shape, dtype, by_columns):
            self._by_columns = by_columns
        if not shape:
            raise InputError(f"DATA must hold an array [N, ...], but {path} holds a single number.")
        if dtype.kind not in "biuf":
            raise InputError(f"DATA must hold numbers, but the array in {path} has dtype {dtype}.")
        if by_columns and path.suffix == ".npz":
            raise InputError(
                f"The array {name!r} in {path} is stored in Fortran order, so its rows cannot be streamed. Save "
                "numpy.ascontiguousarray(x) instead, or write an .npy."
            )
        self.total = shape[0]

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], "np.dtype[Any]", bool]]:
        """The file positioned after the array's header, and the header's shape, dtype and order."""
        try:
            if self._path.suffix == ".npy":
                with self._path.open("rb") as stream:
                    yield (stream, *self._header(stream))
                return
            with zipfile.ZipFile(self._path) as archive:
                names = [entry.removesuffix(".npy") for entry in archive.namelist()]
                if self._name not in names:
                    raise InputError(
                        f"{self._path} has no array {self._name!r}. Set `input` to one of {', '.join(names)}."
                    )
                with archive.open(f"{self._name}.npy") as stream:
                    yield (stream, *self._header(stream))
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self._path} cannot be read: {error}") from error

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], "np.dtype[Any]", bool]:
        try:
            shape, by_columns, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
        except (ValueError, KeyError) as error:
            raise InputError(f"{self._path} cannot be read as an array of numbers: {error}") from error
        return shape, dtype, by_columns

    def pieces(self, size: int) -> Iterator[Piece]:
        """All rows, in pieces of at most ``size``."""
        if self._by_columns:
            whole = np.load(self._path, mmap_mode="r", allow_pickle=False)
            for start in range(0, len(whole), size):
                yield Piece(_in_native_byte_order(np.ascontiguousarray(whole[start : start + size])), None)
            return
        with self._opened() as (stream, (total, *shape), dtype, _):
            for start in range(0, total, size):
                num = min(size, total - start)
                num_bytes = num * math.prod(shape) * dtype.itemsize
                data = _read_exactly(stream, num_bytes)
                if len(data) < num_bytes:
                    raise InputError(
                        f"{self._path} is incomplete: it ends within row {start + len(data) * num // num_bytes} of {total}."
                    )
                yield Piece(_in_native_byte_order(np.frombuffer(data, dtype).reshape(num, *shape)), None)


def _read_exactly(stream: IO[bytes], num: int) -> bytearray:
    """``num`` bytes, or fewer at the end of the stream. One call of ``read`` may return fewer."""
    found = bytearray()
    while len(found) < num and (part := stream.read(num - len(found))):
        found += part
    return found


def _in_native_byte_order(x: Array) -> Array:
    """The array in this machine's byte order, the only one that torch accepts."""
    return x.astype(x.dtype.newbyteorder("="), copy=False)
