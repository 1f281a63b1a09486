"""Checkpoints of ensembles: members that were trained separately, and optimizer states of another execution."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.checkpoint_files import LIGHTNING_VERSION, read_weights
from lightning_uq.errors import InputError
from lightning_uq.modules.arguments import restore_argument
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.features import uncompiled
from lightning_uq.running.loading import load_as_lightning

if TYPE_CHECKING:
    from lightning_uq.modules.ensemble import EnsembleModule

ENSEMBLE_STATE = "lightning_uq_ensemble"
"""The key of a checkpoint under which an ensemble keeps its own state."""

# In the state of a scheduler, lists with one entry per parameter group.
_PER_GROUP = {
    "base_lrs", "_last_lr", "min_lrs", "max_lrs", "initial_lrs", "total_lrs", "lr_lambdas", "base_momentums", "max_momentums",
}  # fmt: skip


def read_member_files(
    checkpoints: Sequence[str | Path],
    network: Callable[[], nn.Module] | None,
    module_class: type[LightningModule] | None,
    weights_only: bool,
    kwargs: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The checkpoints of members that were trained separately, and the arguments of the ensemble that they form.

    Args:
        checkpoints: One file per member.
        network: Factory of a member.
        module_class: The LightningModule that wrote the files, instead of a factory.
        weights_only: False also runs code that is pickled in the files.
        kwargs: Further arguments of the ensemble, which take precedence over those in the files.

    Raises:
        InputError: A file cannot be read, or arguments contradict each other.
    """
    if isinstance(checkpoints, str | Path) or not checkpoints:
        raise InputError(f"`checkpoints` must be a list of files, but it is {checkpoints!r}.")
    if network is not None and module_class is not None:
        raise InputError("Arguments `network` and `module_class` exclude each other: pass one of them.")
    for name in ("trunk", "sharing"):
        if kwargs.get(name) is not None:
            raise InputError(
                f"Members with `{name}` share weights, which cannot come from their files. Load the ensemble's own checkpoint."
            )
    if "num_members" in kwargs:
        raise InputError("Leave out argument `num_members`: there is one member per file.")
    must = "`checkpoints` must name checkpoints"
    files = [read_weights(path, must, weights_only=weights_only) for path in checkpoints]
    found: dict[str, Any] = {}
    if network is None:
        network, found = factory_of(module_class, [file.get("hyper_parameters", {}) for file in files], checkpoints)
    return files, {"network": network, "num_members": len(files), **found, **kwargs}


def load_member_files(
    ensemble: "EnsembleModule", files: Sequence[Mapping[str, Any]], paths: Sequence[str | Path]
) -> None:
    """Load the weights of members that were trained separately, member i's from ``files[i]``.

    A LightningModule loads its own checkpoint as Lightning would, with its hooks.

    Raises:
        InputError: A file does not fit its member.
    """
    network = ensemble.network
    if ensemble.members is not None:
        for i, (file, path) in enumerate(zip(files, paths, strict=True)):
            with ensemble.members.using_stream(i) as module, _naming_file(module, path):
                if LIGHTNING_VERSION in file:
                    load_as_lightning(module, file)
                else:
                    module.configure_model()
                    load_member(module, file["state_dict"], path)
        return
    state: dict[str, Tensor] = {}
    for i, (file, path) in enumerate(zip(files, paths, strict=True)):
        member = network.member(i)
        load_member(member, file["state_dict"], path)
        state.update({f"members.{i}.{name}": value for name, value in member.state_dict().items()})
    network.load_state_dict(state)


@contextmanager
def _naming_file(member: nn.Module, path: str | Path) -> Iterator[None]:
    """Turn torch's error about weights into one that names the file."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{str(path)!r} does not hold the weights of {type(member).__name__}: {reason}") from error


def factory_of(
    module_class: type[LightningModule] | None,
    hyper_parameters: Sequence[Mapping[str, Any]],
    paths: Sequence[str | Path],
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """A factory of the members, and the settings of their outputs, from the hyper-parameters of the checkpoints.

    Raises:
        InputError: The hyper-parameters hold no network, or differ between files: one factory cannot build different members.
    """
    ours = module_class is not None and issubclass(module_class, UncertaintyModule)
    if module_class is not None and not ours:
        parameters = inspect.signature(module_class).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        wanted = [{k: v for k, v in given.items() if takes_all or k in parameters} for given in hyper_parameters]
        _check_equal(wanted, paths)
        return functools.partial(module_class, **wanted[0]), {}
    for given, path in zip(hyper_parameters, paths, strict=True):
        if "network" not in given:
            raise InputError(
                f"{str(path)!r} does not say which network it belongs to. Pass argument `network`, a factory of the members, or "
                "`module_class`."
            )
    names = ("network", "task", "output")
    wanted = [{name: given[name] for name in names if name in given} for given in hyper_parameters]
    _check_equal(wanted, paths)
    first = wanted[0]
    return restore_argument(first.pop("network"), "network"), first


def _check_equal(hyper_parameters: Sequence[Mapping[str, Any]], paths: Sequence[str | Path]) -> None:
    for given, path in zip(hyper_parameters, paths, strict=True):
        first = hyper_parameters[0]
        differing = [k for k in {**first, **given} if not _equal(given.get(k), first.get(k))]
        if differing:
            raise InputError(
                f"The members in {str(paths[0])!r} and {str(path)!r} were built with different values of {', '.join(differing)}. "
                "If that does not affect the network, pass argument `network`, a factory."
            )


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # comparison of arrays
        return len(one) == len(other) and all(map(_equal, one, other))


def check_size(checkpoint: Mapping[str, Any], num_members: int) -> None:
    """Raise an :class:`InputError` if an ensemble with another number of members wrote the checkpoint."""
    size = checkpoint[ENSEMBLE_STATE]["num_members"]
    if size != num_members:
        raise InputError(
            f"The checkpoint holds {size} members, but the ensemble has {num_members} (argument `num_members`)."
        )


def load_member(member: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """Load a member's weights, strictly. A plain network also loads from a module that held it as an attribute.

    Raises:
        InputError: Names or shapes do not match.
    """
    own = {uncompiled(name): name for name in member.state_dict()}
    wanted, state = own.keys(), {uncompiled(name): value for name, value in state.items()}
    # In a LightningModule, the names of its network begin with an attribute's name, such as `model.`
    first = next(iter(wanted), "")
    for prefix in sorted({name[: -len(first)] for name in state if name.endswith(first)}, key=len):
        if wanted == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}:
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            break
    missing, foreign = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or foreign:
        raise InputError(
            f"{str(path)!r} does not hold the weights of {type(member).__name__}: it lacks {_first_names(missing)}, and has "
            f"{_first_names(foreign)} that {type(member).__name__} lacks."
        )
    with _naming_file(member, path):
        member.load_state_dict({own[name]: value for name, value in state.items()})


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def convert_states(checkpoint: dict[str, Any], num_members: int, *, stack: bool) -> None:
    """Convert the optimizer and scheduler states of a checkpoint, if there are any, to another execution.

    Args:
        checkpoint: The checkpoint, which is changed in place.
        num_members: M.
        stack: Whether the resuming ensemble is stacked.
    """
    if "optimizer_states" in checkpoint:
        states, schedulers = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        checkpoint["optimizer_states"] = [convert_optimizer_state(s, num_members, stack=stack) for s in states]
        checkpoint["lr_schedulers"] = [convert_scheduler_state(s, num_members, stack=stack) for s in schedulers]


def convert_optimizer_state(state: Mapping[str, Any], num_members: int, *, stack: bool) -> dict[str, Any]:
    """Convert the optimizer state of a looped ensemble (one parameter group per member) to that of a stacked one, or back.

    Adam, AdamW and SGD act entry by entry, so the state of a stacked parameter is the members' stacked states.

    Args:
        state: The optimizer's ``state_dict``.
        num_members: M.
        stack: True converts from a loop to stacked, False from stacked to a loop.

    Raises:
        InputError: The state has another layout, or the members' settings or step counts differ.
    """
    groups = state["param_groups"]
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    per_group = len(groups[0]["params"])
    if len(groups) != (num_members if stack else 1) or any(o != options[0] for o in options):
        raise InputError(
            "The optimizer state can be converted to another `execution` only if the members share all settings, with one parameter group "
            f"per member in a loop or one group when stacked, but it has {len(groups)} groups for {num_members} members. Resume with the "
            "`execution` that wrote the checkpoint."
        )
    entries, new = state["state"], {}
    for j in range(per_group):
        if stack:
            members = [entries.get(groups[m]["params"][j]) for m in range(num_members)]
            if any(member is None for member in members):
                if any(member is not None for member in members):
                    raise InputError("Some members have not stepped yet: resume with execution='loop'.")
                continue
            new[j] = {key: _stack(key, [member[key] for member in members]) for key in members[0]}
        elif groups[0]["params"][j] in entries:
            entry = entries[groups[0]["params"][j]]
            for m in range(num_members):
                new[m * per_group + j] = {key: _slice(key, value, m) for key, value in entry.items()}
    count = 1 if stack else num_members
    indices = [list(range(m * per_group, (m + 1) * per_group)) for m in range(count)]
    return {"state": new, "param_groups": [{**options[0], "params": params} for params in indices]}


def convert_scheduler_state(state: Any, num_members: int, *, stack: bool) -> Any:
    """Convert the state of a scheduler over one parameter group per member to that of one over a single group, or back."""
    if isinstance(state, Mapping):
        return {
            key: ([value[0]] * (1 if stack else num_members) if value else value)
            if key in _PER_GROUP and isinstance(value, list)
            else convert_scheduler_state(value, num_members, stack=stack)
            for key, value in state.items()
        }
    if isinstance(state, list):
        return [convert_scheduler_state(value, num_members, stack=stack) for value in state]
    return state


def _stack(key: str, values: list[Any]) -> Any:
    if key == "step" or not isinstance(values[0], Tensor):
        if any(value != values[0] for value in values):
            raise InputError("The members have taken different numbers of steps: resume with execution='loop'.")
        return values[0]
    return torch.stack(values)


def _slice(key: str, value: Any, m: int) -> Any:
    # Clone per member: optimizers change their state in place.
    if isinstance(value, Tensor):
        return value.clone() if key == "step" else value[m].clone()
    return value
