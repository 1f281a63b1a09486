"""Calls a network with a batch's input: a tensor, a nested structure of tensors, or arguments by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import both


def call_network(network: nn.Module, x: Any) -> Any:
    """``network(x)``, or ``network(**x)`` for a mapping whose keys are arguments of its ``forward``, as in Hugging Face's models.

    Raises:
        InputError: There is no ``forward``, or it does not take one input.

    Example:
        >>> call_network(nn.Bilinear(2, 3, 4), {"input1": torch.zeros(5, 2), "input2": torch.zeros(5, 3)}).shape
        torch.Size([5, 4])
    """
    if takes_by_name(network, x):
        return network(**x)
    if torch.compiler.is_compiling():
        return network(x)
    if not has_forward(network):
        raise InputError(no_forward(network))
    try:
        return network(x)
    except TypeError as error:
        reason = _refusal(network, x)
        if reason is None:
            raise
        raise InputError(
            f"`forward` of {type(network).__name__} must take only the input of a batch, but it does not: {reason}. Make `unpack_batch` "
            "return the input as a mapping from the names of these arguments, or pass argument `predict_fn` to a callback."
        ) from error


def is_nest_of_tensors(x: Any) -> bool:
    """Whether all data of an input are in tensors that torch can find: a tensor, or a nested structure of tensors and plain values.

    False for an object with tensors as attributes, such as a graph.
    """
    leaves = torch.utils._pytree.tree_leaves(dict(x) if isinstance(x, Mapping) else x)
    return all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves)


def takes_by_name(network: nn.Module, x: Any) -> bool:
    """Whether ``x`` is a mapping whose keys are arguments of the network's ``forward``."""
    if not isinstance(x, Mapping) or not all(isinstance(key, str) for key in x):
        return False
    return signature_of(network) is not None and _refusal(network, **x) is None


def takes_alone(network: nn.Module, x: Any) -> bool:
    """Whether ``network(x)`` matches the signature of the network's ``forward``, such as ``forward(x)`` or ``forward(*args)``."""
    return has_forward(network) and _refusal(network, x) is None


def has_forward(network: nn.Module) -> bool:
    """Whether a network defines ``forward``; a LightningModule may have only steps.

    Example:
        >>> has_forward(nn.Linear(1, 1)), has_forward(LightningModule()), has_forward(nn.ModuleList())
        (True, False, False)
    """
    network = getattr(network, "_orig_mod", network)
    inherited = (*(kind.forward for kind in both(LightningModule)), nn.Module.forward)
    return "forward" in vars(network) or getattr(type(network), "forward", None) not in inherited


def no_forward(network: nn.Module) -> str:
    """The error message for a network without ``forward``."""
    return (
        f"{type(network).__name__} has no `forward` to take outputs from. Pass argument `predict_fn`, a function `(model, x)` that returns "
        "them, such as logits [B, C], or pass the network inside it."
    )


def _refusal(network: nn.Module, *args: Any, **kwargs: Any) -> str | None:
    """The reason why ``forward`` cannot be called like this, or None if it can or if that is unknown."""
    signature = signature_of(network)
    try:
        if signature is not None:
            signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def signature_of(network: nn.Module) -> inspect.Signature | None:
    """The signature of a module's ``forward``, or of the inner module's for a compiled one. None for a scripted module."""
    try:
        return inspect.signature(getattr(network, "_orig_mod", network).forward)
    except (TypeError, ValueError):
        return None
