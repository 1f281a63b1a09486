"""Batches of causal language models, whose logits at a token are about the next one."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError


def next_token_batch(batch: Mapping[str, Any], ignore_index: int = -100) -> tuple[dict[str, Any], Tensor | None]:
    """Input and target of a causal language model's batch: the target at each token is the label of the next one.

    Hugging Face's models take labels that are not shifted, and shift them in their loss. Pass this function as ``unpack_batch``, with
    ``task=Segmentation(class_axis=-1, ignore_index=-100)``, so that logits [B, T, V] meet the labels that they are about. The target is
    ``target[:, t] = labels[:, t + 1]``. It is ``ignore_index`` at the last token and at tokens that ``attention_mask`` marks as padding: no one
    reads a prediction there. (With padding on the left, the loss of Hugging Face counts the one before the first token.)

    Args:
        batch: ``labels`` [B, T], and the arguments of the model's ``forward``, such as ``input_ids`` and ``attention_mask``.
        ignore_index: The label of tokens that do not count.

    Returns:
        The batch without ``labels``, and the target [B, T]; None if there are no labels.

    Raises:
        InputError: The batch is not a mapping, or the labels or the mask are not [B, T].

    Example:
        >>> import torch
        >>> tokens, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
        >>> batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
        >>> next_token_batch(batch)[1]
        tensor([[   6,    7, -100, -100]])
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"A batch of a language model must be a mapping with `input_ids` and `labels`, but it is a {type(batch).__name__}."
        )
    x = {name: value for name, value in batch.items() if name != "labels"}
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None:
        return x, None
    if labels.ndim != 2 or (mask is not None and mask.shape != labels.shape):
        masked = "" if mask is None else f" and `attention_mask` {list(mask.shape)}"
        raise InputError(
            f"`labels` of a language model must be one label per token [B, T], like `attention_mask`, but they are {list(labels.shape)}{masked}."
        )
    target = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    return x, target if mask is None else target.masked_fill(mask == 0, ignore_index)
