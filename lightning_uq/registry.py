"""The methods that ``lightning-uq compare`` knows, each registered in the file that holds it.

A method's file ends with a recipe::

    @register_method("ensemble", ood_score="mutual_information")
    def _compare(setting: Setting) -> LightningModule:
        return EnsembleModule(setting.network, num_members=5, optimizer=setting.optimizer)

:func:`methods` imports every file of the modules and callbacks rooms, so a new one is found without editing another.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lightning_uq.errors import InputError


@dataclass(frozen=True)
class Setting:
    """What a recipe may know of the problem: never its out-of-distribution data, never its test data.

    Attributes:
        data: Name of the data.
        num_features: Input dimension d of flat data.
        num_classes: C.
        num_train: Number of training samples n.
        network: Factory of the backbone that all methods share.
        optimizer: Called with the parameters; the same for all methods unless a recipe says otherwise.
        options: What a data set adds for its methods. The testbed's: ``temperature`` T, ``input_dim`` d, ``num_train`` n and
            ``num_members`` of an ensemble; its network and optimizer, weight decay included, are its agents' own.
    """

    data: str
    num_features: int
    num_classes: int
    num_train: int
    network: Callable[[], nn.Module]
    optimizer: OptimizerCallable
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: Its name on the command line.
        build: Makes the untrained LightningModule.
        ood_score: Name of the out-of-distribution score, fixed here: a key of ``functional.scores.SCORES``, or the name
            of a score that a callback provides.
        trained_as: Name of another method whose trained network this one reads differently; None where it trains its own.
        callbacks: Makes the post-training callbacks.
        fits: Whether the method makes sense on this problem; without ``--methods`` those that do not are left out.
        length: Where the data fix the number of training steps: how many times that number it takes.
    """

    name: str
    build: Callable[[Setting], LightningModule]
    ood_score: str
    trained_as: str | None = None
    callbacks: Callable[[Setting], list[Callback]] = lambda setting: []
    fits: Callable[[Setting], bool] = lambda setting: True
    length: Callable[[Setting], int] = lambda setting: 1


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    ood_score: str,
    trained_as: str | None = None,
    callbacks: Callable[[Setting], list[Callback]] = lambda setting: [],
    fits: Callable[[Setting], bool] = lambda setting: True,
    length: Callable[[Setting], int] = lambda setting: 1,
) -> Callable[[Callable[[Setting], LightningModule]], Callable[[Setting], LightningModule]]:
    """Register the decorated recipe as a row of the comparison.

    Raises:
        InputError: Another recipe has the name.
    """

    def register(build: Callable[[Setting], LightningModule]) -> Callable[[Setting], LightningModule]:
        known = _METHODS.get(name)
        if known is not None and known.build.__module__ != build.__module__:
            raise InputError(f"Expected a new `name` for a method, but {known.build.__module__} registered {name!r}.")
        _METHODS[name] = Method(name, build, ood_score, trained_as, callbacks, fits, length)
        return build

    return register


def methods() -> dict[str, Method]:
    """All registered methods by name: the softmax first, as what the others are compared with; then by file, modules first."""
    for room in ("lightning_uq.modules", "lightning_uq.callbacks"):
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__, room + "."):
            importlib.import_module(module.name)

    def place(method: Method) -> tuple[bool, bool, str]:
        file = method.build.__module__
        return method.name != "softmax", ".callbacks." in file, file

    return {method.name: method for method in sorted(_METHODS.values(), key=place)}
