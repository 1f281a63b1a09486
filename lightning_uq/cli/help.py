"""Short help texts: jsonargparse lists every imported subclass of a type, which for ``torch.nn.Module`` are a thousand."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, get_args

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

# Imported so that the help lists their classes, and so that a configuration can name a class without its path.
import lightning_uq.callbacks
import lightning_uq.data
import lightning_uq.loggers
import lightning_uq.modules
import lightning_uq.networks.backbones
from lightning_uq.errors import InputError
from lightning_uq.importing import import_object
from lightning_uq.lightning_trees import is_subclass
from lightning_uq.networks import EpistemicNetwork
from lightning_uq.networks.factory import Factory

_BASES = {"model": LightningModule, "data": LightningDataModule}
_LIST = ", known subclasses: "
_ROOMS = {"loss": "lightning_uq.losses.", "regularizer": None}
_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")  # such as :class:`~lightning_uq.tasks.Task`


class ShortHelpFormatter(DefaultHelpFormatter):
    """Lists public classes of this package that fit an option, and Lightning's callbacks and the like; no torch classes."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options, whose heading may be the first line of a docstring."""
        super().start_section(None if heading is None else _without_roles(heading))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = _without_roles(super()._get_help_string(action) or "")
        before, listed, after = text.partition(_LIST)
        if not listed:
            return text
        paths, end, rest = after.partition(")")
        known = shown_classes(
            paths.split(", "), action.dest, is_factory=_is_factory(getattr(action, "_typehint", None))
        )
        return before + (_LIST + ", ".join(known) if known else "") + end + rest


def class_list(option: str) -> str:
    """The public classes of this package that an option takes, one per line with the first sentence of its docstring.

    Args:
        option: ``"model"`` or ``"data"``.

    Example:
        >>> class_list("model").splitlines()[3].split()[:4]
        ['lightning_uq.DeterministicModule', 'One', 'network', 'with']
    """
    room, base = {"model": lightning_uq, "data": lightning_uq.data}[option], _BASES[option]
    kinds = {
        f"{room.__name__}.{name}": kind
        for name in sorted(room.__all__)
        if inspect.isclass(kind := getattr(room, name)) and issubclass(kind, base) and not inspect.isabstract(kind)
    }
    width = 2 + max(map(len, kinds))
    summaries = [_without_roles(inspect.getdoc(kind) or "").splitlines()[0] for kind in kinds.values()]
    return "\n".join(
        [
            f"`--{option}` takes the import path of one of these classes, or of a class of your own.",
            *(f"  {path:{width}}{summary}" for path, summary in zip(kinds, summaries, strict=True)),
            f"`--{option}.help={next(iter(kinds))}` lists the arguments of a class.",
        ]
    )


def shown_classes(paths: list[str], option: str, *, is_factory: bool = False) -> list[str]:
    """The class paths that the help of an option shows, in their order.

    Args:
        paths: Class paths of all imported subclasses of the option's type.
        option: Name of the option. Among torch modules, a loss may be one of this package's losses, any other option one of
            its networks.
        is_factory: Whether the option takes a factory of a plain network, which an epistemic network f(x, z) is not.

    Lightning's classes are shown for the Trainer alone, not for a module's arguments.

    Example:
        >>> shown_classes(["torch.nn.Linear", "lightning_uq.networks.MLP", "lightning_uq.losses.CombinedLoss"], "model.network")
        ['lightning_uq.networks.MLP']
    """
    room = _ROOMS.get(option.rpartition(".")[2], "lightning_uq.networks.")
    shown, modules = [], []
    for path in dict.fromkeys(paths):
        found = _public_class(path)
        if found is None:
            continue
        if path.startswith("lightning.") and option.startswith("model."):
            continue
        if is_factory and issubclass(found, EpistemicNetwork):
            continue
        if is_subclass(found, LightningModule):
            modules.append(path)
        elif not issubclass(found, nn.Module) or (room is not None and path.startswith(room)):
            shown.append(path)
    # A LightningModule is an nn.Module as well, but only the option for the model takes one.
    return shown or modules


def _is_factory(kind: Any) -> bool:
    """Whether an option's type is that of a factory of networks: a ``Factory`` or a callable, and no network itself."""
    kinds = [part for part in get_args(kind) if part is not Factory and part is not type(None)]
    return kinds == [Callable[[], nn.Module]]


def _public_class(path: str) -> Any:
    """The class of this package or of Lightning that has this path and is public, else None."""
    room, _, name = path.rpartition(".")
    if path.startswith("lightning_uq.") and name not in getattr(sys.modules.get(room), "__all__", ()):
        return None
    if not path.startswith(("lightning_uq.", "lightning.")):
        return None
    try:
        found = import_object(path)
    except InputError:
        return None
    return None if path.startswith("lightning.") and issubclass(found, nn.Module) else found


def _without_roles(text: str) -> str:
    return _ROLE.sub(r"\1", text).replace("``", "`")
