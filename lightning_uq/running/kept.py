"""A module as it was: its tensors' values, and the attributes that a hook has changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn


@contextmanager
def tensors_put_back(module: nn.Module) -> Iterator[None]:
    """After the context, the parameters and buffers of a module have the values that they had before.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> before = network.weight.item()
        >>> with tensors_put_back(network):
        ...     _ = nn.init.zeros_(network.weight)
        >>> network.weight.item() == before
        True
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if not nn.parameter.is_lazy(tensor)]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def run_revocably(module: nn.Module, hook: Callable[[], None]) -> Callable[[], None]:
    """Run a hook of a module, and give back a function that takes its changes of the module's attributes back.

    Attributes of submodules count, and the entries of lists, dictionaries and sets; what lies deeper does not.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> revoke = run_revocably(network, lambda: setattr(network, "note", "from a checkpoint"))
        >>> revoke()
        >>> hasattr(network, "note")
        False
    """
    before = [
        (vars(part), {name: (value, _entries(value)) for name, value in vars(part).items()})
        for part in module.modules()
    ]
    hook()
    changed = [
        (attributes, held, [name for name in {**held, **attributes} if _differs(attributes, held, name)])
        for attributes, held in before
    ]

    def revoke() -> None:
        for attributes, held, names in changed:
            for name in names:
                if name not in held:
                    attributes.pop(name, None)
                    continue
                attributes[name], entries = held[name]
                if entries is not None:
                    _refill(attributes[name], entries)

    return revoke


def _entries(value: Any) -> list[Any] | dict[Any, Any] | set[Any] | None:
    return copy(value) if isinstance(value, list | dict | set) else None


def _refill(value: Any, entries: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(entries)


def _differs(attributes: dict[str, Any], held: dict[str, tuple[Any, Any]], name: str) -> bool:
    """Whether an attribute is another object than before, or a container of other objects."""
    if name not in held or name not in attributes or attributes[name] is not held[name][0]:
        return True
    now, before = attributes[name], held[name][1]
    if isinstance(before, dict):
        return list(map(id, now)) != list(map(id, before)) or any(now[key] is not before[key] for key in before)
    if isinstance(before, list | set):
        return list(map(id, now)) != list(map(id, before))
    return False
