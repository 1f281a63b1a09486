"""Factories of networks, which an ensemble calls once per member and a checkpoint records."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.importing import import_object


class Factory:
    """An importable class or function with its arguments, called for every network that is built.

    LightningCLI can write it in YAML, where a function with arguments would be called once and passed as an instance:

    .. code-block:: yaml

        network:
          class_path: lightning_uq.Factory
          init_args:
            target: torchvision.models.resnet18
            kwargs: {num_classes: 10}

    An argument can be built in the same way: a mapping with ``target``, a dotted path, and ``kwargs`` is called first, each
    time, and the target receives the result. A function that modifies a network can therefore be put around the network.

    Args:
        target: Dotted import path of the class or function.
        kwargs: Its keyword arguments; those that are mappings of ``target`` and ``kwargs`` are built first.

    Raises:
        InputError: ``target`` cannot be imported or is not callable.

    Example:
        >>> Factory("torch.nn.Linear", {"in_features": 2, "out_features": 3})()
        Linear(in_features=2, out_features=3, bias=True)
        >>> inner = {"target": "torch.nn.Linear", "kwargs": {"in_features": 2, "out_features": 3}}
        >>> Factory("lightning_uq.networks.spectral_normalize", {"network": inner, "coefficient": 0.9})().weight.shape
        torch.Size([3, 2])
    """

    def __init__(self, target: str, kwargs: dict[str, Any] | None = None) -> None:
        self.target = target
        self.kwargs = dict(kwargs or {})
        self._function: Callable[..., Any] = import_object(target)
        self._nested = {name: Factory(**value) for name, value in self.kwargs.items() if _is_factory_config(value)}

    def __call__(self, *args: Any) -> Any:
        """Call the target: ``target(*args, **kwargs)``. A network's factory is called without arguments."""
        built = {name: factory() for name, factory in self._nested.items()}
        return self._function(*args, **{**self.kwargs, **built})

    def __repr__(self) -> str:
        return f"Factory({self.target!r}, {self.kwargs!r})"

    def __reduce__(self) -> tuple[type["Factory"], tuple[str, dict[str, Any]]]:
        return Factory, (self.target, self.kwargs)


NetworkFactory = Factory | Callable[[], nn.Module]


def check_factory(factory: object, argument: str = "network") -> Callable[[], nn.Module]:
    """Return ``factory``, or raise an :class:`InputError` for a built network or an object that is not callable."""
    if isinstance(factory, nn.Module):
        raise InputError(
            f"`{argument}` must be a factory that builds a new network at each call, but it is an instance "
            f"of {type(factory).__name__}. Pass `lambda: {type(factory).__name__}(...)`, a function, or a `Factory`: "
            "members copied from one instance would share their initial weights."
        )
    if not callable(factory):
        raise InputError(f"`{argument}` must be a callable or a `Factory`, but it is {factory!r}.")
    return factory


def build_network(factory: Callable[[], nn.Module], argument: str = "network") -> nn.Module:
    """Call ``factory`` once, and check that it returned a module."""
    network = factory()
    if not isinstance(network, nn.Module):
        raise InputError(f"The factory in `{argument}` must return a torch.nn.Module, but it returned {network!r}.")
    return network


def factory_to_config(factory: object) -> dict[str, Any] | None:
    """A factory, or any callable, as plain data; None if it cannot be imported again (a lambda, a local function).

    An importable class or function, a ``functools.partial`` of one with plain arguments, and a :class:`Factory` become
    ``{"target": "package.name", "kwargs": {...}}``, so that a checkpoint loads under ``weights_only=True``.

    Example:
        >>> factory_to_config(functools.partial(nn.Linear, 2, out_features=3)) is None
        True
        >>> factory_to_config(functools.partial(nn.ReLU, inplace=True))
        {'target': 'torch.nn.modules.activation.ReLU', 'kwargs': {'inplace': True}}
    """
    if isinstance(factory, Factory):
        return {"target": factory.target, "kwargs": dict(factory.kwargs)} if is_plain(factory.kwargs) else None
    kwargs: Mapping[str, Any] = {}
    if isinstance(factory, functools.partial):
        if factory.args:
            return None
        kwargs, factory = factory.keywords, factory.func
    target = f"{getattr(factory, '__module__', None)}.{getattr(factory, '__qualname__', None)}"
    try:
        found = import_object(target)
    except InputError:
        return None
    if found is not factory or target.startswith("__main__.") or not is_plain(kwargs):
        return None
    return {"target": target, "kwargs": dict(kwargs)}


def factory_from_config(config: Any) -> Any:
    """The inverse of :func:`factory_to_config`; any other value is returned unchanged.

    A callable without arguments is returned as itself, so that it equals a default value.
    """
    if _is_factory_config(config) and _names_a_factory(config):
        factory = Factory(config["target"], dict(config["kwargs"]))
        return factory if factory.kwargs else factory._function
    return config


def _is_factory_config(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether ``target`` is a dotted path and ``kwargs`` a mapping. Other mappings with these keys are the user's own data."""
    if not isinstance(value, Mapping) or set(value) != {"target", "kwargs"} or not isinstance(value["kwargs"], Mapping):
        return False
    path = value["target"]
    return isinstance(path, str) and "." in path and all(part.isidentifier() for part in path.split("."))


def _names_a_factory(config: Mapping[str, Any]) -> bool:
    """Whether the target can be imported and called, since a user's own mapping may have the same keys."""
    try:
        return callable(import_object(config["target"]))
    except InputError:
        return False


def is_plain(value: object) -> bool:
    """Whether a value consists only of None, strings, numbers, lists and string-keyed mappings."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)
