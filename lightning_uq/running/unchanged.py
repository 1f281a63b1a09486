"""Keeps what a ``forward`` changes in its own module: a hidden state, a counter, a running mean."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_uq.running.transforms import transforms_of

_ABSENT = object()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the attributes of a model's submodules at the end, as far as a call can have replaced them.

    A list or a dictionary that a call changes in place stays changed. Modules of this package keep what they find out about the data.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with unchanged(layer):
        ...     _ = layer(torch.ones(3, 2))
        >>> layer.running_mean
        tensor([0., 0.])
    """
    users = [module for module in model.modules() if not _is_own(module) and not _is_lazy(module)]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in users
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = [(module, dict(vars(module))) for module in users]
    try:
        yield
    finally:
        for module, before in attributes:
            for name in vars(module).keys() | before.keys():
                if vars(module).get(name, _ABSENT) is not before.get(name, _ABSENT):
                    vars(module).pop(name, None)
                    if name in before:
                        vars(module)[name] = before[name]
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)


def _is_own(module: nn.Module) -> bool:
    return transforms_of(module) is not None or type(module).__module__.partition(".")[0] == "lightning_uq"


def _is_lazy(module: nn.Module) -> bool:
    """Whether the module gets its weights, and another class, at its first call."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(nn.parameter.is_lazy(one) for one in own if one is not None)
