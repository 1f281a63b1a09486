"""Finds and rejects input rows with NaN or infinity."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_uq.errors import NotFiniteError

NonFinite = Literal["error", "inf"]
"""The treatment of an input row with NaN or infinity: an error, or a score of +inf and probabilities of NaN."""


def nonfinite_rows(x: Any) -> Tensor | None:
    """The mask [B] of the rows of an input with NaN or infinity; None for an input without floating-point tensors.

    A nested input may contain a mask that is added to attention scores, so minus infinity is allowed in it. Tensors inside an object,
    such as a graph, are not checked, since they have no rows.

    Example:
        >>> import torch
        >>> nonfinite_rows(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]))
        tensor([False,  True])
    """
    found: Tensor | None = None
    for leaf in tree_leaves(dict(x) if isinstance(x, Mapping) else x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            bad = _unusable(leaf, x)
            rows = bad.flatten(1).any(1) if bad.ndim > 1 else bad
            found = rows if found is None else found | (rows if rows.shape == found.shape else rows.any())
    return found


def _unusable(leaf: Tensor, x: Any) -> Tensor:
    return ~leaf.isfinite() if leaf is x else leaf.isnan() | (leaf == math.inf)


def with_zeros(x: Any) -> Any:
    """The input with 0 in place of the numbers for which :func:`nonfinite_rows` reports a row.

    A network may look up an embedding by a column of its input. NaN there is an index out of range, and would raise for the whole batch.

    Example:
        >>> import torch
        >>> with_zeros(torch.tensor([[2.0, math.nan]]))
        tensor([[2., 0.]])
    """

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.where(_unusable(leaf, x), 0.0, leaf)

    return tree_map(filled, x)


def check_finite(x: Any, where: str = "", advice: str = "") -> None:
    """Reject an input with NaN or infinity.

    Raises:
        NotFiniteError: A row holds them. The message has the number of rows, ``where`` (such as ``"of batch 3"``), and the ``advice``.
    """
    if isinstance(x, Tensor) and x.is_floating_point() and bool(x.detach().sum().isfinite()):
        return  # one pass over the numbers; an overflowing sum needs a closer look
    bad = nonfinite_rows(x)
    if bad is not None and bool(bad.any()):
        raise NotFiniteError(
            f"The input must be finite, but {int(bad.sum())} of {len(bad)} rows{where and f' {where}'} hold NaN or infinity."
            f"{advice and f' {advice}'}"
        )
