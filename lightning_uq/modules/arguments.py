"""Constructor arguments as plain data, so that a checkpoint of a module loads under ``weights_only=True``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.calling import has_forward, no_forward
from lightning_uq.networks.factory import Factory, build_network, factory_from_config, factory_to_config, is_plain


def saved_argument(value: Any) -> Any:
    """Return an argument as plain data; a value that cannot be imported again becomes ``{"unsaved": description}``."""
    if isinstance(value, np.generic):
        value = value.item()
    if is_plain(value):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        found = factory_to_config(type(value))
        saved = {name: saved_argument(field) for name, field in fields.items()}
        if found is not None and not any(_is_unsaved(field) for field in saved.values()):
            return {"class_path": found["target"], "init_args": saved}
    config = factory_to_config(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"unsaved": f"{named.__module__}.{named.__qualname__}"} if config is None else config


def restore_argument(value: Any, name: str) -> Any:
    """Restore an argument from the output of :func:`saved_argument`.

    Raises:
        InputError: The checkpoint could not store the argument, so it must be passed again.
    """
    if _is_unsaved(value):
        raise InputError(
            f"The checkpoint does not hold argument `{name}`: a {value['unsaved']} cannot be saved as plain data. Pass it to "
            f"`load_from_checkpoint(path, {name}=...)`. To have it saved, use a `Factory` or an importable function."
        )
    if isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}:
        return Factory(value["class_path"], {k: restore_argument(v, name) for k, v in value["init_args"].items()})()
    return factory_from_config(value)


def training_option(training: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an argument of ``UncertaintyModule`` that a method needs before it calls ``super().__init__``.

    A method must not call ``training.get(...)`` or ``training.pop(...)`` in its constructor, because jsonargparse would then
    list the name as an argument without a type.
    """
    return training.get(name, default)


def take_training_option(training: dict[str, Any], name: str, default: Any) -> Any:
    """Remove an argument from ``training`` and return it, for a method that passes its own value to the base."""
    return training.pop(name, default)


def given_network(network: Any, training: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the network that argument ``network`` stands for: a network itself, or the one that a factory builds.

    If it is a LightningModule, build its layers in ``configure_model``: Lightning calls that only for the module that it trains.

    Args:
        network: The argument.
        training: The arguments of ``UncertaintyModule``, which may contain a ``predict_fn``.

    Raises:
        InputError: The network has no ``forward``, and there is no ``predict_fn``.
    """
    built = network if isinstance(network, nn.Module) else build_network(network)
    if is_instance(built, LightningModule):
        built.configure_model()
        report_guess(
            f"{type(built).__name__} is trained as a network, by the loss of the task and the argument `optimizer`: its own "
            "`training_step` and `configure_optimizers` are not called. Only the members of an EnsembleModule keep theirs.",
            built,
        )
    if not has_forward(built) and (training or {}).get("predict_fn") is None:
        raise InputError(no_forward(built))
    return built


def _is_unsaved(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"unsaved"}
