"""Selection of rows of a prediction: by an integer, a slice, a boolean mask or positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_uq.errors import InputError

Rows = int | slice | Tensor | Sequence[int] | Sequence[bool] | np.ndarray[Any, Any]

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def selected_rows(index: Any, num_rows: int) -> slice | Tensor:
    """Convert an index to a slice with a positive step, or to positions [N] in [0, ``num_rows``).

    Raises:
        InputError: The index has another type, or a mask has another length.
        IndexError: A position is out of range.

    Example:
        >>> selected_rows(-1, 5), selected_rows([True, False, True], 3)
        (slice(4, 5, None), tensor([0, 2]))
    """
    if isinstance(index, slice):
        return index if index.step is None or index.step > 0 else torch.tensor(range(num_rows)[index], dtype=torch.long)
    if isinstance(index, int | np.integer) and not isinstance(index, bool):
        at = int(index)
        _check_range(at, at, num_rows)
        return slice(at % num_rows, at % num_rows + 1)
    positions = _as_tensor(index)
    if positions.ndim == 0 and positions.dtype in _INTEGERS:
        return selected_rows(int(positions), num_rows)
    if positions.ndim != 1:
        raise InputError(
            f"An index of rows must have one axis, but its shape is {list(positions.shape)}. A prediction can be indexed only along "
            "its batch axis."
        )
    if positions.dtype == torch.bool:
        if len(positions) != num_rows:
            raise InputError(f"A mask must have one value per row: {num_rows}, but it has {len(positions)}.")
        return positions.nonzero().squeeze(1)
    if not len(positions):
        return positions.long()
    if positions.dtype not in _INTEGERS:
        raise InputError(f"Positions of rows must be integers, but they are {positions.dtype}.")
    positions = positions.long()
    _check_range(int(positions.min()), int(positions.max()), num_rows)
    return torch.where(positions < 0, positions + num_rows, positions)


def take_rows(tensor: Tensor, axis: int, rows: slice | Tensor) -> Tensor:
    """The rows of a tensor along its batch axis."""
    if isinstance(rows, slice):
        return tensor[(slice(None),) * axis + (rows,)]
    return tensor.index_select(axis, rows.to(tensor.device))


def _as_tensor(index: Any) -> Tensor:
    if isinstance(index, list | range | Tensor | np.ndarray):
        try:
            # torch refuses arrays with negative strides, such as `np.argsort(score)[::-1]`.
            if isinstance(index, Tensor):
                return index
            array = np.ascontiguousarray(index)
            return torch.as_tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise InputError(
        "A prediction is indexed by an integer, a slice, a mask [B] or positions [N], but the index is a "
        f"{type(index).__name__}: {index!r}."
    )


def _check_range(low: int, high: int, num_rows: int) -> None:
    if low < -num_rows or high >= num_rows:
        wrong = low if low < -num_rows else high
        raise IndexError(f"Row {wrong} is out of range: the prediction has {num_rows} rows.")


def joined_field(name: str, axis: int | None, predictions: Sequence[Any]) -> Tensor | None:
    """Concatenate one field of several predictions."""
    parts = [prediction._get(name) for prediction in predictions]
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        raise InputError(f"All or none of `predictions` must hold `{name}`, but only some do.")
    if axis is None:
        if any(not torch.equal(part, present[0]) for part in present):
            raise InputError(f"`{name}` must be the same in all of `predictions`, but it differs.")
        shared: Tensor = present[0]
        return shared
    shapes = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in present}
    if len(shapes) > 1:
        found = " and ".join(str(list(part.shape)) for part in present)
        raise InputError(f"`{name}` may differ only in axis {axis} between `predictions`, but its shapes are {found}.")
    return torch.cat(present, axis)
