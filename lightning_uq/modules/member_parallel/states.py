"""The optimizer's state of all members, from the states of the processes that train them, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.ensemble import EnsembleNetwork


def own_entries(optimizer: Optimizer, share: EnsembleNetwork) -> dict[int, Any]:
    """The entries of an optimizer's state that belong to a process's members, by the parameter's number, on the CPU."""
    own = {id(p) for p in share.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = optimizer.state_dict()["state"]
    found = {i: entries[i] for i, p in enumerate(parameters) if id(p) in own and i in entries}
    return {
        i: {key: value.cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for i, entry in found.items()
    }


def joined(shares: Sequence[Mapping[int, Any]], *, is_stacked: bool) -> dict[int, Any]:
    """The entries of all members.

    Args:
        shares: The entries of each share of the members, in their order.
        is_stacked: Whether each entry holds the rows of a share's members.
    """
    if not is_stacked:
        return {i: entry for entries in shares for i, entry in entries.items()}
    return {
        i: {key: _rows_of_all([entries[i][key] for entries in shares]) for key in entry}
        for i, entry in shares[0].items()
    }


def _rows_of_all(values: Sequence[Any]) -> Any:
    first = values[0]
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.ndim else first


def narrowed(state: Mapping[str, Any], members: range, num_members: int) -> dict[str, Any]:
    """A stacked optimizer's state with the rows of some members only.

    Raises:
        UnsupportedError: A tensor of the state has no row per member.
    """

    def rows(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if len(value) != num_members:
            raise UnsupportedError(
                f"MemberParallelStrategy can only split optimizer states with one row for each of {num_members} stacked members, but "
                f"{key!r} has shape {list(value.shape)}. Use execution='loop'."
            )
        return value[members.start : members.stop].clone()

    entries = {i: {key: rows(key, value) for key, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": entries}
