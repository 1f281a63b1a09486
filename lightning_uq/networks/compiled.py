"""Exchanges weights between compiled and plain networks, although ``torch.compile`` changes their names."""

from typing import Any

from torch import nn

from lightning_uq.networks.features import uncompiled

_MARK = "_orig_mod"


def take_compiled_names(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename, in place, the entries of a state dict for ``module``, if either of the two was compiled and the other was not.

    Example:
        >>> state = {"network._orig_mod.weight": 0}
        >>> take_compiled_names(nn.ModuleDict({"network": nn.Linear(1, 1)}), state, "")
        >>> state
        {'network.weight': 0}
    """
    names = [name for name, _ in module.named_modules()]
    if not any(_MARK in name.split(".") for name in [*names, *state_dict]):
        return
    own = {uncompiled(name): name for name in module.state_dict()}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        plain = uncompiled(key.removeprefix(prefix))
        state_dict[prefix + own.get(plain, plain)] = state_dict.pop(key)
