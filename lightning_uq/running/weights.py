"""Whether a module still has the weights that something was fitted on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_uq.networks.fingerprint import persistent_tensors, same_weights, weights_fingerprint

_SAMPLED_TENSORS = 8
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class WeightsMark:
    """A cheap mark of a module's weights: an equal mark means that nothing has touched them since.

    Attributes:
        version: Sum of torch's version counters, which every in-place change raises.
        tensors: The tensors' identities, dtypes and places in their storages.
        storages: Weak references to the storages. No other storage has the address of one while a reference is held.
        sample: Sums over a few values of a few tensors. They show changes that pass the version counters by, such as
            ``parameter.data.copy_(...)``, by which Lightning swaps averaged weights.
    """

    version: int
    tensors: tuple[tuple[Any, ...], ...]
    storages: tuple[StorageWeakRef, ...]
    sample: tuple[float, ...]


def weights_mark(module: nn.Module) -> WeightsMark | None:
    """The mark of a module's weights, or None if they are inference tensors, which have no version counters.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> before = weights_mark(network)
        >>> _ = nn.init.zeros_(network.bias)
        >>> before == weights_mark(network)
        False
    """
    tensors = [tensor for _, tensor in persistent_tensors(module)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return WeightsMark(
        sum(tensor._version for tensor in tensors),
        tuple((id(tensor), tensor.dtype, tensor.device, tensor.storage_offset()) for tensor in tensors),
        tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors),  # type: ignore[no-untyped-call]
        _sample([tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]),
    )


def _sample(tensors: list[Tensor]) -> tuple[float, ...]:
    if not tensors:
        return ()
    # The last tensors are always among them: a head is often trained alone.
    chosen = tensors[:: -(-len(tensors) // _SAMPLED_TENSORS)] + tensors[-2:]
    values = [tensor.reshape(-1)[:: -(-tensor.numel() // _SAMPLED_VALUES)].float().sum() for tensor in chosen]
    return tuple(torch.stack([value.to(values[0].device) for value in values]).tolist())


class WeightsCheck:
    """Compares a module's weights with a fingerprint, and only if the cheap mark has changed since the last comparison.

    Args:
        fingerprint: What :func:`~lightning_uq.networks.fingerprint.weights_fingerprint` gave.

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
        """The same where the module's mark is known; a mark reads the weights, so several checks share one."""
        if mark is not None and mark == self._mark:
            return True
        matches = same_weights(self.fingerprint, weights_fingerprint(module), module)
        self._mark = mark if matches else None
        return matches

    def accept(self, module: nn.Module) -> None:
        """Take the module's weights for those of the fingerprint: for a rank whose first rank has compared them."""
        self._mark = weights_mark(module)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module has other tensors: its first use compares them.
        return {**self.__dict__, "_mark": None}
