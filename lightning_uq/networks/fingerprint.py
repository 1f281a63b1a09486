"""Hash of a module's weights, to recognize the network of a fitted state."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.functional.precision import to_float64
from lightning_uq.networks.sharding import full_tensor, sharded

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes for which a fingerprint has a number, in order."""

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
# An odd multiplier spreads positions over 64 bits, so that swapping two rows changes the sum.
_SPREAD = -7046029254386353131
_PIECE = 2**19  # values at a time, with about 20 MB of intermediate numbers


def weights_fingerprint(module: nn.Module) -> Tensor:
    """Fingerprint [4] (int64) of the parameters and persistent buffers of ``module``.

    It has one number per dtype in :data:`DTYPES`, so that weights fitted in one precision are recognized in another
    (:func:`same_weights`). Each number is a wrap-around sum over the bits of every value times a hash of its position and its
    tensor's name, so one changed bit or two swapped rows change it. The names that ``torch.compile`` adds are removed, and
    the states of torchmetrics are skipped, because they change while a model is tested. The fingerprint of a module that is sharded
    over ranks is that of the whole module, on any number of ranks; it gathers one parameter at a time, a collective.

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
    with sharded(module):
        for name, tensor in persistent_tensors(module):
            salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
            total += _hashes(full_tensor(tensor.detach())).cpu() * (salt | 1)
    return total


def same_weights(fitted: Tensor, current: Tensor, module: nn.Module) -> bool:
    """Whether two fingerprints agree in the coarsest floating dtype that the weights of ``module`` have or had: :func:`coarsest_dtype`."""
    return agree(fitted, current, coarsest_dtype(module))


def agree(fitted: Tensor, current: Tensor, dtype: torch.dtype) -> bool:
    """Whether two fingerprints agree in a dtype."""
    position = DTYPES.index(dtype)
    return bool(fitted[position].cpu() == current[position].cpu())


def coarsest_dtype(module: nn.Module) -> torch.dtype:
    """The coarsest floating dtype that the weights of ``module`` have or had. A collective if they are float64 and sharded.

    In a float64 run, Lightning loads a checkpoint into float32 weights before it casts them to float64. Weights that float32
    represents exactly are therefore compared as float32.
    """
    with sharded(module):
        tensors = [tensor.detach() for _, tensor in persistent_tensors(module) if tensor.is_floating_point()]
        held = {tensor.dtype for tensor in tensors}
        coarsest = next((dtype for dtype in reversed(DTYPES) if dtype in held), DTYPES[0])
        # A list, since every rank must gather every tensor.
        if coarsest == torch.float64 and all([_is_float32(full_tensor(tensor)) for tensor in tensors]):  # noqa: C419
            return torch.float32
        return coarsest


def _is_float32(tensor: Tensor) -> bool:
    """Whether float32 represents all values exactly."""
    return all(torch.equal(piece, piece.float().to(piece.dtype)) for piece in pieces(tensor))


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


def _hashes(tensor: Tensor) -> Tensor:
    """The number for each dtype in :data:`DTYPES`, [4]."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    total, num_before = torch.zeros(len(DTYPES), dtype=torch.int64, device=tensor.device), 0
    for piece in pieces(values):
        position = torch.arange(num_before + 1, num_before + len(piece) + 1, device=piece.device).mul_(_SPREAD)
        num_before += len(piece)
        position ^= position >> 29
        position += 1  # bits * position, plus the bits
        total = total + torch.stack([_as_bits(piece, dtype).to(piece.device).mul_(position).sum() for dtype in DTYPES])
    return total


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in order, in pieces, without copying all values or all numbers per value at once."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.reshape(-1), _PIECE)
    elif tensor.numel() <= _PIECE:
        yield tensor.reshape(-1)
    elif len(tensor) == 1:
        yield from pieces(tensor[0])
    else:
        for part in torch.split(tensor, max(1, _PIECE * len(tensor) // tensor.numel())):
            yield from pieces(part)


def _as_bits(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of values [N] in a dtype, as new int64 numbers."""
    if not piece.is_floating_point():
        return piece.to(torch.int64, copy=True)
    rounded = to_float64(piece) if dtype == torch.float64 else piece.to(dtype)
    return rounded.contiguous().view(_BITS[dtype]).to(torch.int64, copy=True)
