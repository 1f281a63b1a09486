"""The pinball loss of quantiles, and their layout in one output tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.quantiles import check_levels, pinball
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.reduction import Reduction, reduce


def split_quantiles(output: Tensor, num_levels: int) -> Tensor:
    """Quantiles [..., D, Q] of an output [..., Q D]: the D quantiles of the first level, then those of the next.

    They are returned as the network predicts them, and may cross. Half precision is upcast to float32.

    Raises:
        InputError: The last axis is not a multiple of Q.

    Example:
        >>> split_quantiles(torch.tensor([[1.0, 10.0, 2.0, 20.0]]), 2)
        tensor([[[ 1.,  2.],
                 [10., 20.]]])
    """
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % num_levels:
        raise InputError(
            f"`output` must have shape [..., {num_levels} D], the D quantiles of each level in turn, but its shape is "
            f"{list(output.shape)}."
        )
    blocks: Tensor = upcast(output).unflatten(-1, (num_levels, -1))  # type: ignore[no-untyped-call]
    return blocks.transpose(-1, -2)


def pinball_loss(
    quantiles: Tensor, target: Tensor, levels: Sequence[float] = (0.1, 0.5, 0.9), reduction: Reduction = "mean"
) -> Tensor:
    """Mean over the levels of the pinball loss, in the target's units.

    Args:
        quantiles: Quantiles [B, D, Q], which may cross.
        target: Targets [B, D].
        levels: Their levels in (0, 1), in increasing order.
        reduction: ``"mean"`` over all targets, ``"sum"``, or ``"none"`` for [B, D].

    Raises:
        InputError: The shapes do not match, or ``levels`` or ``reduction`` is invalid.

    Source: Koenker & Bassett, Econometrica 46 (1978).

    Example:
        >>> pinball_loss(torch.zeros(1, 1, 2), torch.ones(1, 1), (0.5, 0.9))
        tensor(0.7000)
    """
    found = check_levels(levels)
    check_shape("quantiles", quantiles, torch.Size([*target.shape, len(found)]))
    quantiles = upcast(quantiles)
    level = torch.tensor(found, dtype=quantiles.dtype, device=quantiles.device)
    return reduce(pinball(quantiles, target.unsqueeze(-1), level).mean(-1), reduction)
