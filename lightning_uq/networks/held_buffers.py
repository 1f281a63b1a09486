"""A pass in training mode that does not change the network's buffers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def held_buffers(module: nn.Module) -> Iterator[None]:
    """A context in which a module in training mode updates copies of its buffers (the statistics of BatchNorm), which are then dropped.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> with held_buffers(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean
        tensor([0.])
    """
    held = [(m._buffers, dict(m._buffers)) for m in module.modules() if m.training and m._buffers]
    try:
        for buffers, originals in held:
            buffers.update({name: None if b is None else b.clone() for name, b in originals.items()})
        yield
    finally:
        for buffers, originals in held:
            buffers.update(originals)
