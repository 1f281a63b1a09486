"""Marks of samples: hashes of their values, for comparing two readings of data."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Marker:
    """Hashes samples as they are read.

    Example:
        >>> marker = Marker()
        >>> marker.add((torch.zeros(2, 3), {"label": [0, 1]}))
        >>> marker.mark == mark([(torch.zeros(2, 3), {"label": [0, 1]})])
        True
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Add a batch, or another nested structure of tensors, arrays, numbers, strings and bytes. Other objects are skipped."""
        for array in _arrays(value):
            self._digest.update(f"{array.dtype} {array.shape}".encode())
            self._digest.update(np.ascontiguousarray(array).tobytes())

    @property
    def mark(self) -> str:
        """The mark of all added values."""
        return self._digest.hexdigest()


def mark(values: Iterable[Any]) -> str:
    """The mark of some values."""
    marker = Marker()
    for value in values:
        marker.add(value)
    return marker.mark


def _arrays(value: Any) -> Iterator["np.ndarray[Any, Any]"]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        yield (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
    elif isinstance(value, np.ndarray | np.generic | int | float | str | bytes):
        yield np.asarray(value)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _arrays(value[key])
    elif isinstance(value, Sequence):
        for one in value:
            yield from _arrays(one)
