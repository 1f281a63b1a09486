"""Loads trained models from their checkpoints."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq.callbacks.sibling import WRITTEN_BY, check_complete
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.importing import import_class, import_object
from lightning_uq.lightning_trees import is_subclass
from lightning_uq.modules.member_files import load_member
from lightning_uq.networks.factory import Factory, build_network


def load_model(
    path: str | Path, module: str | None = None, network: str | None = None, init_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """A trained model from a Lightning checkpoint, read with ``weights_only=True``.

    Args:
        path: The file.
        module: Import path of the LightningModule that wrote the file. It is not needed for files that the command line or a
            post-training callback of this package wrote.
        network: Instead of ``module``: import path of a class or function that builds only the network. Its weights in the file may
            have the prefix of an attribute's name.
        init_args: Arguments of the module or the network.

    Raises:
        InputError: The file cannot be read, does not name its module, or does not match it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "linear.ckpt"
        >>> torch.save({"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}}, path)
        >>> load_model(path, network="torch.nn.Linear", init_args={"in_features": 2, "out_features": 1}).weight.tolist()
        [[1.0, 1.0]]
    """
    arguments = dict(init_args or {})
    checkpoint = read_checkpoint(path)
    if network is not None:
        with input_errors(f"`network` {network!r} cannot be built"):
            built = build_network(Factory(network, arguments), "network")
        load_member(built, checkpoint["state_dict"], path)
        return built
    of_command_line = checkpoint.get("hyper_parameters", {}).get("_class_path")
    name = module or of_command_line or checkpoint.get(WRITTEN_BY, {}).get("class_path")
    if name is None:
        raise InputError(
            f"{str(path)!r} does not name the LightningModule that wrote it. Pass `module`, its import path (such as "
            "lightning_uq.DeterministicModule), or `network`, the import path of a function that builds only the network."
        )
    kind = import_class(name, LightningModule, "module") if name == module else _written_by(path, name)
    check_complete(path, checkpoint, arguments, "Pass them in `init_args`, or pass `network`.")
    with input_errors(f"{str(path)!r} is not a checkpoint of {name}"):
        loaded: nn.Module = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **arguments)
    return loaded


def find_device(accelerator: str) -> torch.device:
    """The device for the name of an accelerator.

    Raises:
        InputError: This machine has no such device.
    """
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = "cuda" if accelerator == "gpu" else accelerator
    if kind == "auto":
        kind = next(name for name, there in kinds.items() if there)
    if not kinds[kind]:
        raise InputError(f"`accelerator` is {accelerator!r}, but this machine has no {kind} device.")
    return torch.device(kind)


def _written_by(path: str | Path, name: str) -> Any:
    """The LightningModule that a file names."""
    network = (
        "`network`, the import path of a function or class that builds the network, and its arguments as `init_args`"
    )
    try:
        found = import_object(name)
    except InputError as error:
        raise InputError(
            f"{str(path)!r} was written by {name}, which cannot be imported here. Pass its current import path as `module`, or {network}."
        ) from error
    if not is_subclass(found, LightningModule):
        raise InputError(f"{str(path)!r} was written by {name}, which is not a LightningModule. Pass {network}.")
    return found


@contextmanager
def input_errors(problem: str) -> Iterator[None]:
    """Turn errors caused by a user's input into an :class:`InputError` of one line: ``problem`` and the error's text.

    Errors of this package do not change.
    """
    try:
        yield
    except UQError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArgumentError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{problem}: {text[:400] or type(error).__name__}") from error
