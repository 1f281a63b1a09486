"""Hash of a module's weights, to recognise the network a state was fitted to."""

import hashlib

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.functional.precision import to_float64

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The roundings that a fingerprint holds, in its order."""

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
# An odd multiplier spreads positions over 64 bits, so that a swap of two rows changes the sum.
_SPREAD = -7046029254386353131


def weights_fingerprint(module: nn.Module) -> Tensor:
    """Fingerprint [4] (int64) of the parameters and persistent buffers of ``module``.

    One number per rounding in :data:`DTYPES`, so that weights fitted in one precision are recognised in another
    (:func:`same_weights`). Each is a wrap-around sum over the bits of every value times a hash of its position and its
    tensor's name: one changed bit or two swapped rows change it. The names that ``torch.compile`` adds are stripped, and
    the states of torchmetrics are left out, for they change while a model is tested.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = weights_fingerprint(net)
        >>> same_weights(before, weights_fingerprint(net.bfloat16()), net)
        True
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(0.5)
        >>> same_weights(before, weights_fingerprint(net), net)
        False
    """
    total = torch.zeros(len(DTYPES), dtype=torch.int64)
    for name, tensor in persistent_tensors(module):
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        total += torch.stack([_hash(_as_bits(tensor.detach(), dtype)).cpu() for dtype in DTYPES]) * (salt | 1)
    return total


def same_weights(fitted: Tensor, current: Tensor, module: nn.Module) -> bool:
    """Whether two fingerprints agree in the coarsest floating dtype that the weights of ``module`` have now, or had.

    In a float64 run Lightning loads a checkpoint into float32 weights before it makes them float64: weights that float32
    holds exactly are compared as float32.
    """
    tensors = [tensor.detach() for _, tensor in persistent_tensors(module) if tensor.is_floating_point()]
    held = {tensor.dtype for tensor in tensors}
    coarsest = max((i for i, dtype in enumerate(DTYPES) if dtype in held), default=0)
    if DTYPES[coarsest] == torch.float64 and all(torch.equal(t, t.float().to(t.dtype)) for t in tensors):
        coarsest = DTYPES.index(torch.float32)
    return bool(fitted[coarsest].cpu() == current[coarsest].cpu())


def persistent_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and persistent buffers of ``module`` with their names, without the states of torchmetrics."""
    found = []
    metrics = [name for name, child in module.named_modules() if isinstance(child, Metric)]
    for path, child in module.named_modules():
        if any(path == metric or path.startswith(metric + ".") for metric in metrics):
            continue
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in own:
            if name not in child._non_persistent_buffers_set:
                found.append((f"{path}.{name}".replace("_orig_mod.", ""), tensor))
    return found


def _as_bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return torch.view_as_real(tensor).flatten().to(torch.int64) if tensor.is_complex() else tensor.flatten().long()
    rounded = to_float64(tensor) if dtype == torch.float64 else tensor.to(dtype)
    return rounded.flatten().contiguous().view(_BITS[dtype]).long()


def _hash(bits: Tensor) -> Tensor:
    position = torch.arange(1, len(bits) + 1, device=bits.device) * _SPREAD
    return (bits * (position ^ (position >> 29))).sum() + bits.sum()
