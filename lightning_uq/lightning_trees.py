"""Lightning's two class trees: `lightning.pytorch`, which this package uses, and `pytorch_lightning`.

Both packages hold the same code, but their classes are distinct. A user's project may be written with either, or use a library
that is written with the other one. Every check of a Lightning class goes through this file.
"""

import sys
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from typing_extensions import TypeIs

T = TypeVar("T")

_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def both(kind: type[T]) -> tuple[type[T], ...]:
    """A Lightning class, and its twin in the other tree if the process has imported that tree.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> both(Trainer)[0] is Trainer
        True
    """
    twin = _twin(kind)
    return (kind,) if twin is None else (kind, twin)


def is_instance(value: object, *kinds: type[T]) -> TypeIs[T]:
    """``isinstance(value, kinds)`` for Lightning classes of either tree.

    Example:
        >>> is_instance(LightningModule(), LightningModule, Callback)
        True
    """
    return any(isinstance(value, both(kind)) for kind in kinds)


def is_subclass(value: type, *kinds: type[T]) -> TypeIs[type[T]]:
    """``issubclass(value, kinds)`` for Lightning classes of either tree."""
    return any(issubclass(value, both(kind)) for kind in kinds)


def in_tree_of(value: object, thing: T) -> T:
    """The Lightning class or function ``thing`` from the tree of the module, data module or callback ``value``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> in_tree_of(LightningModule(), Trainer) is Trainer
        True
    """
    if isinstance(value, LightningModule | LightningDataModule | Callback):
        return thing
    twin: T | None = _twin(thing)
    return thing if twin is None else twin


def _twin(thing: Any) -> Any:
    for ours, theirs in _TWINS.items():
        if thing.__module__ == ours or thing.__module__.startswith(f"{ours}."):
            module = sys.modules.get(theirs + thing.__module__.removeprefix(ours))  # never imported here
            return getattr(module, thing.__name__, None)
    return None
