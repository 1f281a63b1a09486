"""The padding mask of a batch of tokens, read from the calls of a network."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_uq.networks.calling import signature_of

_NAMES = ("attention_mask", "src_key_padding_mask")


class PaddingMask:
    """The mask [B, T] of the tokens of a batch that are not padding, read from the call of a network or of a module in it.

    It reads an argument ``attention_mask`` (Hugging Face: padding is 0, or negative in an additive mask) or ``src_key_padding_mask`` (``nn.TransformerEncoder``:
    padding is True), passed by name, by position or in a mapping. A mask with more or fewer than two axes is ignored, and so is the mask
    of a call inside another call with a mask. The latest of several calls counts.

    Attributes:
        tokens: True for tokens that are not padding [B, T]; None if no call had a mask.

    Example:
        >>> import torch
        >>> mask, layer = PaddingMask(), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
        >>> handles = mask.watch(layer)
        >>> mask.start()
        >>> _ = layer(torch.zeros(1, 2, 4), src_key_padding_mask=torch.tensor([[False, True]]))
        >>> mask.tokens
        tensor([[ True, False]])
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.reading = False
        self.holder: str | None = None  # the module whose running call got the mask

    def watch(self, network: nn.Module) -> list[RemovableHandle]:
        """Read the calls of a network and of its modules, after :meth:`start`."""
        handles: list[RemovableHandle] = []
        for name, module in network.named_modules():
            if module is network or next(module.children(), None) is not None:
                entered = _Entered(self, name, _positions(module))
                handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
                handles.append(module.register_forward_hook(_Left(self, name)))
        return handles

    def start(self) -> None:
        """Start reading calls."""
        self.tokens, self.reading, self.holder = None, True, None

    def stop(self) -> None:
        """Stop, and forget the mask."""
        self.tokens, self.reading, self.holder = None, False, None


@contextmanager
def padding_mask_of(network: nn.Module) -> Iterator[PaddingMask]:
    """The padding mask of the latest call of a network inside the context."""
    mask = PaddingMask()
    handles = mask.watch(network)
    mask.start()
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()


class _Entered:
    """A hook that is copied together with its network, like the next one."""

    def __init__(self, mask: PaddingMask, name: str, positions: dict[str, int]) -> None:
        self.mask = mask
        self.name = name
        self.positions = positions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.mask.reading or self.mask.holder is not None:
            return
        for name in _NAMES:
            for found in self._arguments(name, args, kwargs):
                if isinstance(found, Tensor) and found.ndim == 2:
                    self.mask.tokens = _real_tokens(name, found)
                    self.mask.holder = self.name
                    return

    def _arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The possible values of the argument with that name."""
        position = self.positions.get(name, len(args))
        return [
            kwargs.get(name),
            *args[position : position + 1],
            *(one.get(name) for one in (*args, *kwargs.values()) if isinstance(one, Mapping)),
        ]


class _Left:
    def __init__(self, mask: PaddingMask, name: str) -> None:
        self.mask = mask
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.mask.holder == self.name:
            self.mask.holder = None


def _real_tokens(name: str, mask: Tensor) -> Tensor:
    """The tokens that are not padding. A floating-point ``attention_mask`` without positive values is added to the scores of attention."""
    if name == "attention_mask":
        return (mask != 0) != (mask <= 0).all() if mask.is_floating_point() else mask != 0
    return mask == 0


def _positions(module: nn.Module) -> dict[str, int]:
    """The positions of the masks among the positional arguments of a module's ``forward``."""
    signature = signature_of(module)
    parameters = [] if signature is None else list(signature.parameters.values())
    positional = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return {name: positional.index(name) for name in _NAMES if name in positional}
