"""How many indices one pass takes in evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Indices times inputs. A processor is fastest where a layer's activations stay in its cache; a GPU needs many rows.
_MAX_ROWS, _MAX_ROWS_CPU = 1 << 16, 1 << 13


def indices_at_once(x: Any, numbers: int = 0, max_numbers: int = 1) -> int:
    """How many indices one pass over the batch ``x`` takes, at least one.

    Args:
        x: The input, with its batch in axis 0.
        numbers: How many numbers one index holds, besides what its inputs need.
        max_numbers: How many of those there is memory for.

    Example:
        >>> indices_at_once(torch.zeros(1024, 3)), indices_at_once(torch.zeros(1024, 3), 10, 25)
        (8, 2)
    """
    first = next((leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim), None)
    rows = 1 if first is None else max(1, len(first))
    most = _MAX_ROWS_CPU if first is None or first.device.type == "cpu" else _MAX_ROWS
    return max(1, min(most // rows, max_numbers // numbers if numbers else most))


def in_chunks(run: Callable[[Tensor], Tensor], index: Tensor, size: int) -> Tensor:
    """``run`` over ``size`` rows of ``index`` at a time, concatenated: [Z, ...]."""
    if len(index) <= size:
        return run(index)
    return torch.cat([run(part) for part in torch.split(index, size)])
