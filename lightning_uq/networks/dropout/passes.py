"""One pass through a network with seeds: the action of each of its dropouts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.dropout.attention import attend
from lightning_uq.networks.dropout.masks import keep_mask

_ENTRYWISE = (F.dropout, torch.dropout)
_CHANNELWISE = (F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout)
_ALPHA = (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout)


class Dropped(NamedTuple):
    """A recorded call of a dropout.

    Attributes:
        shape: The input's shape.
        layer: The ``nn.Dropout`` layer; None for a function call.
    """

    shape: tuple[int, ...]
    layer: nn.Module | None


class DropoutPass(TorchFunctionMode):
    """The dropouts of one pass, with masks determined by the seeds.

    Hooks report layers (:meth:`drop`). Inside ``with dropout_pass:``, dropouts that are function calls are found too:
    ``F.dropout`` and its variants, ``F.scaled_dot_product_attention`` and ``nn.MultiheadAttention``.

    Args:
        index: Seeds [Z].
        shared: Whether all rows of a batch share one mask.
        late: Whether the network's input is the batch [B, ...] itself, which the first dropout repeats for each index.
        axes: The batch axis of each call's input, None if it has none; calls beyond the list have axis 0.
        function_rates: The rates of function calls in training, in order, for those that have a rate of 0 in evaluation.
        keep: Returns the masks: see :func:`~lightning_uq.networks.dropout.masks.keep_mask`.
        rate: Replaces every rate above 0, for examining the dropouts; None keeps their own rates.

    Attributes:
        calls: The calls so far.
        rates_seen: The rates of function calls so far.
    """

    def __init__(
        self,
        index: Tensor,
        *,
        shared: bool = True,
        late: bool = False,
        axes: Sequence[int | None] = (),
        function_rates: Sequence[float] = (),
        rate: float | None = None,
        keep: Callable[[Tensor, int, Sequence[int], float], Tensor] = keep_mask,
    ) -> None:
        super().__init__()
        self.index = index
        self.shared = shared
        self.late = late
        self.axes = axes
        self.function_rates = function_rates
        self.rate = rate
        self.keep = keep
        self.calls: list[Dropped] = []
        self.rates_seen: list[float] = []
        self.in_layer = False

    def drop(self, x: Tensor, rate: float, *, channelwise: bool = False, layer: nn.Module | None = None) -> Tensor:
        """The input with entries or whole channels dropped, and the others divided by the probability of keeping."""
        number = len(self.calls)
        self.calls.append(Dropped(tuple(x.shape), layer))
        rate = rate if self.rate is None or rate == 0 else self.rate
        repeats = self.late and number == 0
        if rate == 0:
            return x.repeat(len(self.index), *[1] * (x.ndim - 1)) if repeats else x
        axis = self.axes[number] if number < len(self.axes) else 0
        index = self.index.to(x.device)
        scale = 0.0 if rate == 1 else 1 / (1 - rate)
        shape = list(x.shape)
        if axis == 0:
            if not repeats and x.shape[0] % len(index):
                raise UnsupportedError(
                    f"A dropout's input has shape {shape}, whose axis 0 is not the batch, although it was at the first batch. Make the "
                    "network call its dropouts in the same order for every batch."
                )
            x = x.unsqueeze(0) if repeats else x.reshape(len(index), -1, *x.shape[1:])
            shape[0] = 1 if self.shared else x.shape[1]
        elif axis is not None and self.shared:
            shape[axis] = 1
        if channelwise:
            shape[2:] = [1] * (len(shape) - 2)
        mask = (self.keep(index, number, shape, rate) * scale).to(x.dtype)
        return (x * mask).flatten(0, 1) if axis == 0 else x * mask[0]  # without a batch in axis 0, one index at a time

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, given)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **given)
        if self.in_layer:
            return func(*args, **given)
        if func in _ENTRYWISE or func in _CHANNELWISE:
            return self._function(func in _CHANNELWISE, *args, **given)
        if func in _ALPHA:
            raise UnsupportedError("DropoutNetwork does not support alpha dropout: use nn.Dropout.")
        return func(*args, **given)

    def _function(
        self,
        channelwise: bool,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
    ) -> Tensor:
        """A dropout that is a function call. For any value of ``training``, it has masks in evaluation too."""
        dropped = self.drop(input, self._function_rate(p), channelwise=channelwise)
        return input.copy_(dropped) if inplace else dropped

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        rate = self._function_rate(dropout_p)
        if rate == 0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
        return attend(query, key, value, attn_mask, is_causal, lambda weights: self.drop(weights, rate), **kwargs)

    def _function_rate(self, rate: float) -> float:
        """The rate of the next function call: its own, or its rate in training."""
        number = len(self.rates_seen)
        self.rates_seen.append(rate)
        return self.function_rates[number] if rate == 0 and number < len(self.function_rates) else rate

    def _multi_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``nn.MultiheadAttention``, whose function calls dropout by its name in ``torch.nn.functional``."""
        num_heads, rate = args[4], args[10] if len(args) > 10 else kwargs["dropout_p"]
        if rate == 0:
            return func(*args, **kwargs)

        def dropout(weights: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            by_head = weights.reshape(-1, num_heads, *weights.shape[1:])  # [B heads, L, S]
            return self.drop(by_head, p).reshape(weights.shape)

        def attention(
            query: Tensor, key: Tensor, value: Tensor, mask: Any = None, p: float = 0.0, causal: bool = False
        ) -> Tensor:
            return attend(query, key, value, mask, causal, lambda weights: self.drop(weights, p))

        args = (*args[:13], True, *args[14:]) if len(args) > 13 else args
        given = {**kwargs, "training": True} if len(args) <= 13 else kwargs
        with mock.patch.multiple(F, dropout=dropout, scaled_dot_product_attention=attention):
            return func(*args, **given)
