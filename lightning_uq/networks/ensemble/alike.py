"""Checks whether the members of an ensemble differ only in their weights, so that one forward pass serves all of them."""

import copy
import enum
import functools
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.labels import label


def check_alike(members: Sequence[nn.Module]) -> None:
    """Check that the forward pass of one member, with the tensors of another, is the forward pass of that other member.

    Raises:
        UnsupportedError: The members differ in more than the values of their parameters and buffers, or have parts that
            cannot be exchanged; the message names the difference or the part.
    """
    first = members[0]
    _check_exchangeable(first)
    seen: set[int] = set()
    for i, member in enumerate(members):
        for name, tensor in named_tensors(member):
            if id(tensor) in seen:
                raise UnsupportedError(f"{name!r} of member {i} is shared with another member or under another name")
            seen.add(id(tensor))
    ours = dict(first.named_modules())
    for i, member in enumerate(members[1:], 1):
        theirs = dict(member.named_modules())
        if ours.keys() != theirs.keys():
            raise UnsupportedError(f"member {i} has other submodules than member 0")
        for name, module in ours.items():
            difference = _difference(module, theirs[name])
            if difference is not None:
                raise UnsupportedError(f"{label(name, module)} of member {i} differs from member 0 in {difference}")
    # `train(mode)` sets the mode of all modules, so it must agree with theirs; a frozen prior keeps its own.
    switched = dict(skeleton(first).train(first.training).named_modules())
    for name, module in ours.items():
        if module.training != switched[name].training:
            raise UnsupportedError(f"{label(name, module)} is not in the mode of the network")


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under all of their names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def visible_difference(ours: nn.Module, theirs: nn.Module) -> str | None:
    """The difference between two networks besides the values and devices of their tensors; None if none was found.

    Of other attributes, only plain ones are compared, such as the rate of a dropout layer.
    """
    mine, other = dict(ours.named_modules()), dict(theirs.named_modules())
    if mine.keys() != other.keys():
        return f"the two have different submodules: {', '.join(sorted(mine.keys() ^ other.keys()))}"
    for name, module in mine.items():
        if type(module) is not type(other[name]):
            return f"{label(name, module)} has become a {type(other[name]).__name__}"
        for key, value in vars(module).items():
            if key in _MODULE_ATTRIBUTES or key.startswith("_") or not isinstance(value, _PLAIN):
                continue
            if not _same(value, vars(other[name]).get(key)):
                return f"{label(name, module)} differs in its attribute {key!r}"
    first, second = (
        {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named_tensors(network)}
        for network in (ours, theirs)
    )
    changed = next((name for name in {**first, **second} if first.get(name) != second.get(name)), None)
    return None if changed is None else f"the shape, dtype or requires_grad of {changed!r} differs"


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of ``network`` without the values of its tensors.

    Raises:
        UnsupportedError: The network cannot be copied.
    """
    try:
        return copy.deepcopy(network).to("meta")
    except Exception as error:  # an attribute that cannot be copied may raise anything
        raise UnsupportedError(f"{type(network).__name__} cannot be copied ({error})") from error


def _check_exchangeable(network: nn.Module) -> None:
    if any(base.__name__ == "LightningModule" for base in type(network).__mro__):
        raise UnsupportedError("a LightningModule runs its own steps, one member after the other")
    tensors = dict(named_tensors(network))
    if not tensors:
        raise UnsupportedError(f"{type(network).__name__} has no parameters")
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedError(f"{name!r} is lazy and was not initialized by a batch")
        if type(tensor) not in (nn.Parameter, Tensor):
            raise UnsupportedError(f"{name!r} is a {type(tensor).__name__}, not a plain parameter or buffer")
    for name, module in network.named_modules():
        where = label(name, module)
        if hasattr(module, "_orig_mod"):
            raise UnsupportedError(
                f"{where} is compiled; compile members that run at once together with `network.compile()`"
            )
        for hooks in ("forward", "forward_pre", "backward", "backward_pre", "state_dict", "load_state_dict_pre"):
            if getattr(module, f"_{hooks}_hooks"):
                raise UnsupportedError(f"{where} has {hooks} hooks")
        if is_parametrized(module):
            raise UnsupportedError(f"{where} is parametrized")
        if isinstance(module, nn.RNNBase):
            raise UnsupportedError(f"{where} is recurrent")
        if isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedError(f"{where} communicates with other processes")
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            raise UnsupportedError(f"{where} has momentum=None, a cumulative average")
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)} | persistent_buffers(network)
    if set(network.state_dict()) != names:
        raise UnsupportedError(
            f"the state dict of {type(network).__name__} has entries other than its parameters and buffers"
        )


def persistent_buffers(network: nn.Module) -> set[str]:
    """The names of the buffers in the state dict."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


def _difference(a: nn.Module, b: nn.Module) -> str | None:
    if type(a) is not type(b):
        return f"its class, {type(b).__name__} instead of {type(a).__name__}"
    for kind in ("_parameters", "_buffers"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        for name in {**ours, **theirs}:
            if _signature(ours.get(name)) != _signature(theirs.get(name)):
                return f"the shape, dtype, device or requires_grad of {name!r}"
    if a._non_persistent_buffers_set != b._non_persistent_buffers_set:
        return "which buffers are persistent"
    ours, theirs = ({k: v for k, v in vars(m).items() if k not in _MODULE_ATTRIBUTES} for m in (a, b))
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name]):
            return f"its attribute {name!r}"
    return None


def _signature(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


_PLAIN = (str, int, float, complex, bytes, torch.dtype, torch.device, type(None), type, enum.Enum, range, slice)


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes are certainly equal. Tensors are not, since every member would use the first member's."""
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if a is b:
        return True
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, FunctionType):  # each call of a constructor makes a new function from a lambda
        return a.__code__ is b.__code__ and _same(_bound_values(a), _bound_values(b))
    return isinstance(a, _PLAIN) and bool(a == b)


def _bound_values(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    # A function in a closure may refer to this one, so functions are compared by identity.
    cells = [id(value) if isinstance(value, FunctionType) else value for value in cells]
    return function.__defaults__, function.__kwdefaults__, cells
