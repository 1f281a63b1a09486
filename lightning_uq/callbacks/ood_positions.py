"""Selects the positions of maps that count for scores."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.running.logits import LogitReader


def counted_positions(
    reader: LogitReader,
    model: nn.Module,
    batch: Any,
    shape: list[int],
    tokens: Tensor | None,
    *,
    by_target: bool,
    is_mask: bool,
) -> Tensor | None:
    """The mask [B, *P] of the positions that count; None if all count.

    Targets are not used for scores of whole inputs, since those of an ``ood`` loader may be missing, and it must be read like
    the test set.

    Args:
        reader: Reader of the model's batches.
        model: The model.
        batch: The batch.
        shape: [B, *P].
        tokens: The positions that are not padding, as the network was called; None if it got no mask.
        by_target: Whether the target also marks positions.
        is_mask: Whether the target is a mask of the out-of-distribution positions.

    Raises:
        InputError: The target must be a mask, but is not.
    """
    words = None if tokens is None or list(tokens.shape) != shape else tokens.cpu()
    if not by_target:
        return words
    _, target = reader.unpack(model, batch)
    found = _masked(target, shape) if is_mask else _labelled(reader, model, target, shape)
    return words if found is None else found.cpu() if words is None else words & found.cpu()


def _labelled(reader: LogitReader, model: nn.Module, target: Any, shape: list[int]) -> Tensor | None:
    if not isinstance(target, Tensor) or list(target.shape) != shape:
        return None
    positions = reader.task(model).row_positions(target)
    if positions is None:
        return None
    counted = torch.zeros(target.numel(), dtype=torch.bool)
    counted[positions.cpu()] = True
    return counted.reshape(shape)


def _masked(target: Any, shape: list[int]) -> Tensor:
    if target is None or list(target.shape) != shape:
        came = "none" if target is None else f"targets of shape {list(target.shape)}"
        raise InputError(
            f"With `masks=True`, the targets of the `ood` loaders must be masks {shape} of the positions that are out of "
            f"distribution, but a batch has {came}. Leave `masks` out to count all positions."
        )
    mask: Tensor = target == 1
    return mask
