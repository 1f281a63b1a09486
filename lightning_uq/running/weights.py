"""Checks whether a module still has the weights of a fit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_uq.networks.fingerprint import persistent_tensors, pieces, same_weights, weights_fingerprint
from lightning_uq.networks.sharding import local_tensor

_BLOCK = 1024
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = -7046029254386353131  # odd, so that its multiples spread positions over 64 bits


@dataclass(frozen=True)
class WeightsMark:
    """A mark of a module's weights, cheaper than a fingerprint. An equal mark means that they have not changed.

    Attributes:
        version: Sum of torch's version counters, which every in-place change raises.
        tensors: The tensors' identities, dtypes and positions in their storages.
        storages: Weak references to the storages. While a reference exists, no other storage can have the same address.
        sums: One number per device, from sums over the bits of all values. They reveal changes that the version counters miss,
            such as ``parameter.data.copy_(...)``, with which Lightning swaps averaged weights.
    """

    version: int
    tensors: tuple[tuple[Any, ...], ...]
    storages: tuple[StorageWeakRef, ...]
    sums: tuple[int, ...]


def weights_mark(module: nn.Module) -> WeightsMark | None:
    """The mark of a module's weights, or None if they are inference tensors, which have no version counters.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> before = weights_mark(network)
        >>> _ = nn.init.zeros_(network.bias)
        >>> before == weights_mark(network)
        False
    """
    held = [tensor for _, tensor in persistent_tensors(module)]
    tensors = [local_tensor(tensor) for tensor in held]  # the shards of this rank
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return WeightsMark(
        sum(tensor._version for tensor in tensors),
        tuple((id(tensor), tensor.dtype, tensor.device, tensor.storage_offset()) for tensor in held),
        tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors),  # type: ignore[no-untyped-call]
        _sums([tensor.detach() for tensor in tensors]),
    )


def parameters_mark(module: nn.Module) -> WeightsMark | None:
    """The mark of only a module's parameters, like :func:`weights_mark`: a forward pass may change buffers."""
    return weights_mark(nn.ParameterList(p for p in module.parameters() if not nn.parameter.is_lazy(p)))


def _sums(tensors: list[Tensor]) -> tuple[int, ...]:
    """A wrap-around sum per device over all bits, each block's row and column weighted by its position."""
    parts: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        own = parts.setdefault(tensor.device, [])
        # On a CPU, a sum in int64 copies its input.
        for flat in pieces(values) if tensor.is_cpu else [values.reshape(-1)]:
            bits = flat.view(_BITS[flat.element_size()])
            num_blocks = len(bits) // _BLOCK
            blocks, rest = bits[: num_blocks * _BLOCK].view(num_blocks, _BLOCK), bits[num_blocks * _BLOCK :]
            own += [blocks.sum(0), blocks.sum(1)] if num_blocks else []
            own.append(rest.long())
    found = []
    for own in parts.values():
        numbers = torch.cat(own)
        position = torch.arange(1, len(numbers) + 1, device=numbers.device) * _SPREAD
        found.append(int((numbers * (position ^ (position >> 29))).sum()))
    return tuple(found)


class WeightsCheck:
    """Compares a module's weights with a fingerprint, but only if the cheap mark has changed since the last comparison.

    Args:
        fingerprint: The result of :func:`~lightning_uq.networks.fingerprint.weights_fingerprint`.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> check = WeightsCheck(weights_fingerprint(network))
        >>> check(network), check(nn.Linear(2, 2))
        (True, False)
    """

    def __init__(self, fingerprint: Tensor) -> None:
        self.fingerprint = fingerprint
        self._mark: WeightsMark | None = None

    def __call__(self, module: nn.Module) -> bool:
        """Whether the module has the weights of the fingerprint."""
        return self.holds(module, weights_mark(module))

    def holds(self, module: nn.Module, mark: WeightsMark | None) -> bool:
        """Like :meth:`__call__`, with a known mark. Computing a mark reads the weights, so several checks share one."""
        if mark is not None and mark == self._mark:
            return True
        matches = same_weights(self.fingerprint, weights_fingerprint(module), module)
        self._mark = mark if matches else None
        return matches

    def accept(self, module: nn.Module) -> None:
        """Accept the module's weights as those of the fingerprint, on a rank whose first rank has compared them."""
        self._mark = weights_mark(module)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module has other tensors, which its first use compares.
        return {**self.__dict__, "_mark": None}
