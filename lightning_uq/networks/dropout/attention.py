"""Scaled dot-product attention with given dropout masks for its weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    drop: Callable[[Tensor], Tensor],
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """drop(softmax(q k^T scale + mask)) v, with the arguments of ``F.scaled_dot_product_attention``.

    Args:
        query: [..., L, E].
        key: [..., S, E].
        value: [..., S, V].
        mask: Added to the scores; of booleans, False removes an entry.
        is_causal: Whether position i attends only to the positions up to i.
        drop: Drops entries of the weights [..., L, S].
        scale: None for 1 / sqrt(E).
        enable_gqa: Whether several query heads share a key head.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(attend(q, k, v, None, True, lambda weights: weights), expected, atol=1e-6)
        True
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return drop(torch.softmax(scores, -1)) @ value
