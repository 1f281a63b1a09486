"""The number of indices per pass in evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Indices times inputs. A CPU is fastest if a layer's activations fit into its cache; a GPU needs many rows.
_MAX_ROWS, _MAX_ROWS_CPU = 1 << 16, 1 << 13


def num_rows(x: Any) -> int:
    """The size of a batch that is a tensor or a nested structure of tensors; 1 if it has no tensor."""
    return max(1, len(_first(x)))


def most_rows(x: Any) -> int:
    """The largest number of indices times inputs per pass over the batch ``x``."""
    return _MAX_ROWS_CPU if _first(x).device.type == "cpu" else _MAX_ROWS


def indices_at_once(x: Any, numbers: int = 1, max_numbers: int = 1 << 62) -> int:
    """The number of indices per pass over the batch ``x``, at least one.

    Args:
        x: The input, with its batch in axis 0.
        numbers: The size of one index.
        max_numbers: The largest total size of the indices of a pass.

    Example:
        >>> indices_at_once(torch.zeros(1024, 3)), indices_at_once(torch.zeros(1024, 3), 10, 25)
        (8, 2)
    """
    return max(1, min(most_rows(x) // num_rows(x), max_numbers // max(1, numbers)))


def in_chunks(run: Callable[[Tensor], Tensor], index: Tensor, size: int) -> Tensor:
    """The concatenated results [Z, ...] of ``run`` for ``size`` rows of ``index`` at a time."""
    if len(index) <= size:
        return run(index)
    parts = torch.split(index, size)
    if torch.is_grad_enabled():
        return torch.cat([run(part) for part in parts])
    whole = None
    for start, part in zip(range(0, len(index), size), parts, strict=True):
        output = run(part)
        if whole is None:
            whole = output.new_empty(len(index), *output.shape[1:])
        whole[start : start + size] = output
        del output  # keeps only the whole and one part in memory
    assert whole is not None
    return whole


def _first(x: Any) -> Tensor:
    return next((leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim), torch.empty(1))
