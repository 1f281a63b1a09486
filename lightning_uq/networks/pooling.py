"""Pools the input of a layer to one vector of features per sample."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import describe

Pool = Literal["mean", "last_token", "cls", "positions"] | Callable[[Any, Any], Any]
"""A name, or ``pool(x, mask)`` to features [B, D]; typed loosely, so that the command line can build classes with such an argument."""

_NAMES = ("mean", "last_token", "cls", "positions")
_FUNCTION = "a function `pool(x, mask)` that returns features [B, D]"

# Layers that determine the feature axis of their input, and the attribute with the number of features.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], int, str | None], ...] = (
    ((nn.Linear,), -1, "in_features"),
    ((nn.RNNBase,), -1, "input_size"),
    ((nn.MultiheadAttention,), -1, "embed_dim"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1, "in_channels"),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1, "in_channels"),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1, "num_features"),
    ((nn.GroupNorm,), 1, "num_channels"),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1, None),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1, None),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1, None),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1, None),
)


def check_pool(pool: Pool | None) -> None:
    """Reject a value that is neither the name of a pooling nor a function.

    Example:
        >>> check_pool("max")
        Traceback (most recent call last):
        lightning_uq.errors.InputError: `pool` must be 'mean', 'last_token', 'cls', 'positions' or a function, but it is 'max'.
    """
    if pool is not None and not callable(pool) and pool not in _NAMES:
        raise InputError(f"`pool` must be 'mean', 'last_token', 'cls', 'positions' or a function, but it is {pool!r}.")


def pool_setting(pool: Pool | None) -> str | None:
    """A pooling as plain data, for a fitted state: its name, or ``"function <name>"``.

    Example:
        >>> pool_setting("mean"), pool_setting(torch.add)
        ('mean', 'function add')
    """
    return f"function {getattr(pool, '__name__', type(pool).__name__)}" if callable(pool) else pool


def pool_features(
    x: Any, layer: nn.Module, pool: Pool | None = None, mask: Tensor | None = None, *, name: str = ""
) -> Tensor:
    """Features [B, D] from the input of a layer; half precision is upcast to float32.

    An input [B, D] is used unchanged. In an input with more axes, the layer determines which axis holds the features: the last axis
    for ``nn.Linear``, recurrent layers and attention, and axis 1 for convolutions and their normalization and pooling layers.
    A block is treated like its first layer. Then:

    - ``pool=None`` averages a convolution's [B, D, *P] over the positions; every other input needs a ``pool``;
    - ``"mean"`` averages over the positions, or over the tokens that ``mask`` keeps;
    - ``"last_token"`` takes the last token of [B, T, D] that ``mask`` keeps;
    - ``"cls"`` takes the first token of [B, T, D];
    - ``"positions"`` pools nothing: the features are [B, D, *P], one vector per position of a map;
    - a function ``pool(x, mask)`` gets the unchanged input.

    The features of a sample without tokens are NaN.

    Args:
        x: The input of the layer, with the batch on axis 0.
        layer: The layer.
        pool: How the input is pooled.
        mask: True for the tokens that count [B, T]; None if all count.
        name: Name of the layer, for errors.

    Raises:
        InputError: A ``pool`` is needed, or it does not match the input or the mask.

    Example:
        >>> x, mask = torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[True, True, False]])
        >>> [pool_features(x, nn.Linear(1, 2), pool, mask).item() for pool in ("mean", "last_token", "cls")]
        [2.0, 3.0, 1.0]
    """
    if isinstance(x, Tensor) and x.is_nested and (mask is not None or pool == "cls"):
        # `nn.TransformerEncoder` passes only the real tokens to its layers; padding follows them.
        x = torch.nested.to_padded_tensor(x, 0.0, None if mask is None else (*mask.shape, x.size(-1)))
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.is_nested:
        found = f"a nested tensor of {x.dtype}" if isinstance(x, Tensor) and x.is_nested else describe(x)
        raise InputError(
            f"The input of layer {name!r} must be a floating-point tensor [B, ..., D] to hold features, but it is {found}. "
            "Pass the name of another layer."
        )
    if x.ndim == 2:
        if pool == "positions":
            raise InputError(
                f"`pool='positions'` needs features at each position of a map, but the input of layer {name!r} is {list(x.shape)}. "
                "Pass the name of a layer with a map as input: [B, D, ...] of a convolution, or [B, ..., D] of a linear layer."
            )
        return upcast(x)
    if callable(pool):
        return _result_of(pool, x, mask)
    axis = _feature_axis(layer, x)
    if axis is None:
        raise InputError(
            f"Layer {name!r} does not determine which axis of its input {list(x.shape)} holds the features. Pass the name of the linear layer or "
            f"the convolution that takes them, or {_FUNCTION} as `pool`."
        )
    if pool is None and axis == -1:
        names = "'mean', 'last_token', 'cls'" if x.ndim == 3 else "'mean'"
        raise InputError(
            f"The input of layer {name!r} is {list(x.shape)}. Its last axis holds the features, and the others must be pooled. "
            f"Pass {names} or {_FUNCTION} as `pool`."
        )
    if pool == "positions":
        return upcast(x.movedim(axis, 1))
    if mask is not None and mask.shape != x.movedim(axis, -1).shape[:-1]:
        raise InputError(
            f"`pool={pool!r}` needs a padding mask for the tokens of the input {list(x.shape)} of layer {name!r}, but the mask "
            f"is {list(mask.shape)}. Pass {_FUNCTION} as `pool`."
        )
    if mask is None and pool in (None, "mean"):
        return upcast(x).flatten(2).mean(2) if axis == 1 else upcast(x).flatten(1, -2).mean(1)
    tokens = upcast(x.movedim(axis, -1))
    if pool == "mean":
        assert mask is not None
        return _masked_mean(tokens.flatten(1, -2), mask.flatten(1))
    if x.ndim != 3:
        raise InputError(
            f"`pool={pool!r}` needs tokens [B, T, D], but the input of layer {name!r} is {list(x.shape)}. Use 'mean', or {_FUNCTION}."
        )
    return tokens[:, 0] if pool == "cls" else tokens[:, -1] if mask is None else _last_token(tokens, mask)


def num_features(layer: nn.Module) -> int | None:
    """The number of features D in the input of a layer; None if unknown.

    Example:
        >>> num_features(nn.Linear(4, 3)), num_features(nn.ReLU())
        (4, None)
    """
    for kinds, _, size in _KINDS:
        if isinstance(layer, kinds):
            return None if size is None else int(getattr(layer, size))
    return None


def _feature_axis(layer: nn.Module, x: Tensor) -> int | None:
    """The feature axis of the layer, or of the first layer in a block; None if unknown or if the sizes differ."""
    for module in layer.modules():
        for kinds, axis, size in _KINDS:
            if isinstance(module, kinds):
                return axis if size is None or x.shape[axis] == getattr(module, size) else None
    return None


def _result_of(pool: Callable[[Any, Any], Any], x: Tensor, mask: Tensor | None) -> Tensor:
    features = pool(x, mask)
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim != 2:
        raise InputError(
            f"The function `pool` must return features [B, D] for an input {list(x.shape)}, but it returned {describe(features)}."
        )
    return upcast(features)


def _masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    kept = tokens.masked_fill(~mask.unsqueeze(2), 0.0)  # not a product, since padding may be infinite
    return kept.sum(1) / mask.sum(1, keepdim=True)


def _last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    token = tokens.gather(1, last.clamp_min(0)[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)
    return token.masked_fill((last < 0).unsqueeze(1), torch.nan)
