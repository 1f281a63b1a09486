"""Checks of arguments shared by all executions of an ensemble."""

from typing import Any

from torch import nn

from lightning_uq.errors import InputError


def check_members(members: Any) -> list[nn.Module]:
    """The members as a list.

    Raises:
        InputError: There are no members, or one of them is not a module.
    """
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise InputError(f"`members` must be a list of modules, but it is one {type(members).__name__}.")
    listed = list(members)
    if not listed:
        raise InputError("`members` must hold at least one module, but it is empty.")
    for i, member in enumerate(listed):
        if not isinstance(member, nn.Module):
            raise InputError(f"`members` must hold torch.nn.Modules, but item {i} is {member!r}.")
    return listed


def check_algorithm(algorithm: str) -> str:
    """``"norm"`` or ``"value"``, also for members of Lightning's enumeration.

    Raises:
        InputError: ``algorithm`` is neither.
    """
    name = str(getattr(algorithm, "value", algorithm)).lower()
    if name not in ("norm", "value"):
        raise InputError(f"`algorithm` must be 'norm' or 'value', but it is {algorithm!r}.")
    return name
