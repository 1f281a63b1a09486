"""Restores the tensors and the attributes of a module after a hook."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def tensors_put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context after which parameters and buffers have their earlier values again.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> before = network.weight.item()
        >>> with tensors_put_back(network.parameters()):
        ...     _ = nn.init.zeros_(network.weight)
        >>> network.weight.item() == before
        True
    """
    tensors = [tensor for tensor in tensors if not nn.parameter.is_lazy(tensor)]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def run_revocably(module: nn.Module, hook: Callable[[], None]) -> Callable[[], None]:
    """Run a hook of a module, and return a function that undoes its changes of the module's attributes.

    It covers the attributes of submodules and the entries of lists, dictionaries and sets, but nothing deeper. If a hook
    raises, its changes are undone at once.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> revoke = run_revocably(network, lambda: setattr(network, "note", "from a checkpoint"))
        >>> revoke()
        >>> hasattr(network, "note")
        False
    """
    before = [_Attributes(part) for part in module.modules()]
    try:
        hook()
    except BaseException:
        for one in before:
            one.put_back(one.changed())
        raise
    changed = [(one, one.changed()) for one in before]

    def revoke() -> None:
        for one, names in changed:
            one.put_back(names)

    return revoke


class _Attributes:
    """The attributes of a module at one time, and the entries of those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.now = vars(module)
        self.held = {name: (value, _entries(value)) for name, value in self.now.items()}

    def changed(self) -> list[str]:
        """The names of attributes that are now other objects, or containers of other objects."""
        return [name for name in {**self.held, **self.now} if self._differs(name)]

    def put_back(self, names: list[str]) -> None:
        """Restore the earlier values of these attributes."""
        for name in names:
            if name not in self.held:
                self.now.pop(name, None)
                continue
            value, entries = self.held[name]
            self.now[name] = value
            if entries is not None:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(entries)

    def _differs(self, name: str) -> bool:
        if name not in self.held or name not in self.now or self.now[name] is not self.held[name][0]:
            return True
        now, entries = self.now[name], self.held[name][1]
        if entries is None:
            return False
        is_same = list(map(id, now)) == list(map(id, entries))
        return not is_same or (isinstance(now, dict) and any(now[key] is not entries[key] for key in entries))


def _entries(value: Any) -> Any:
    return copy(value) if isinstance(value, list | dict | set) else None
