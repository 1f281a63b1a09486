"""Modules that FSDP2 (``torch.distributed.fsdp.fully_shard``) has divided among ranks.

Each rank holds a part of every parameter, a DTensor, and a forward pass gathers the parameters layer by layer. So all ranks have to
run the same number of forward passes, which passes over exact data do not: a rank may have one batch less than another.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_uq.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_gathered: WeakSet[nn.Module] = WeakSet()  # the parts that are inside `gathered`


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module or to a part of it.

    Example:
        >>> is_sharded(nn.Linear(1, 1))
        False
    """
    return bool(_parts(module))


def full_tensor(tensor: Tensor) -> Tensor:
    """All values of a tensor. A collective if it is a DTensor."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded module on rank 0, on the CPU, and an empty one on other ranks. A collective."""
    # Imported here, because only sharded modules need it.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context in which each rank holds all parameters as plain tensors, so that forward passes are independent of other ranks.

    It needs the memory of all parameters, but not of gradients or optimizer states. Entering it is a collective, leaving it is not.

    Raises:
        UnsupportedError: A parameter is divided in another way than by ``fully_shard``.
    """
    parts = [part for part in _parts(module) if part not in _gathered]
    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.reshard)
            stack.callback(_keep_gathered(part))
            part.unshard()
            _gathered.add(part)
            stack.callback(_gathered.discard, part)
        for name, parameter in module.named_parameters():
            if _is_dtensor(parameter):
                raise UnsupportedError(
                    f"Parameter {name} of {type(module).__name__} is a DTensor that `fully_shard` did not make. Only models "
                    "sharded by `fully_shard` are supported."
                )
        yield


def shard(module: nn.Module, mesh: "DeviceMesh") -> None:
    """Divide a module's parameters, which are equal on all ranks, among the ranks of a mesh, block by block.

    The blocks are the elements of the outermost ``nn.Sequential`` and ``nn.ModuleList`` parts, so a forward pass gathers one block at a
    time. A module with sharded parts stays as it is.
    """
    from torch.distributed.fsdp import fully_shard

    if is_sharded(module):
        return
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def copy_from_first_rank(module: nn.Module, mesh: "DeviceMesh") -> None:
    """Overwrite parameters and buffers that are not sharded by those of the mesh's first rank. A collective."""
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for tensor in (*module.parameters(), *module.buffers()):
        if not _is_dtensor(tensor):
            torch.distributed.broadcast(tensor.detach(), first, group)


def average_gradients(module: nn.Module, mesh: "DeviceMesh") -> None:
    """Replace the gradients of parameters that are not sharded by their means over the ranks of a mesh. A collective."""
    for parameter in module.parameters():
        if parameter.grad is not None and not _is_dtensor(parameter):
            torch.distributed.all_reduce(parameter.grad, group=mesh.get_group())
            parameter.grad /= mesh.size()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # these have no forward pass to gather for
        if isinstance(module, nn.Sequential | nn.ModuleList) and not is_container:
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _blocks(child)


class GatheredStage:
    """:func:`gathered` from one hook to another.

    Example:
        >>> stage = GatheredStage()
        >>> stage.start(nn.Linear(1, 1))
        >>> stage.end()
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def start(self, module: nn.Module) -> None:
        """Gather the parameters. A collective."""
        self.end()
        self._stack = ExitStack()
        self._stack.enter_context(gathered(module))

    def end(self) -> None:
        """Return to this rank's shards, if a stage has started."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_stack": None}  # a copy has not gathered anything


@contextmanager
def sharded(module: nn.Module) -> Iterator[None]:
    """A context in which the parameters are the shards that are trained, even inside :func:`gathered` or after a forward pass.

    Gathered parameters may have another dtype (``MixedPrecisionPolicy``). A collective inside :func:`gathered`.
    """
    parts = _parts(module)
    for part in parts:
        part.reshard()
    try:
        yield
    finally:
        for part in parts:
            if part in _gathered:
                part.unshard()


def _parts(module: nn.Module) -> list[Any]:
    # A process without a sharded module need not import FSDP.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [part for part in module.modules() if isinstance(part, fsdp)]


def _is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def _keep_gathered(part: Any) -> Any:
    """Make FSDP leave the parameters gathered after a pass, and return a function that restores its settings.

    FSDP has public setters, but only private attributes tell the earlier settings.
    """
    state = part._get_fsdp_state()
    is_auto = getattr(state, "_auto_reshard_after_forward", False)
    # In earlier releases of torch, a module has at most one group.
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [one for one in ([state._fsdp_param_group] if groups is None else groups) if one is not None]
    kept = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    part.set_reshard_after_forward(False, recurse=False)
    part.set_reshard_after_backward(False, recurse=False)

    def restore() -> None:
        if hasattr(state, "_auto_reshard_after_forward"):
            state._auto_reshard_after_forward = is_auto
        for group, after_forward, after_backward in kept:
            # The first forward pass makes the outermost part the root, which by default does not reshard.
            group.post_forward_mesh_info = None if is_auto and state._is_root else after_forward
            group.reshard_after_backward = after_backward

    return restore
