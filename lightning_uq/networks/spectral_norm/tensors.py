"""Small tensor functions shared by the bounds."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_unit(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """A random unit vector, equal in every process, without the global random state."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return F.normalize(x.flatten(), dim=0).reshape(shape).to(like)


def unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """``x`` / |x|, or ``otherwise`` if |x| vanishes or overflows, since no iteration recovers from zero."""
    norm = torch.linalg.vector_norm(x)
    return torch.where((norm > 1e-12) & (norm < math.inf), x / norm, otherwise)


def units(xs: list[Tensor], otherwise: list[Tensor]) -> Tensor:
    """:func:`unit` of each tensor, :func:`joined`, with as many operations for many tensors as for two."""
    if len(xs) == 1:
        return unit(xs[0], otherwise[0]).flatten()
    norms = torch.stack(torch._foreach_norm(xs))
    divisors = norms.masked_fill((norms <= 1e-12) | (norms == math.inf), math.nan)
    flat = joined(xs) / spread(divisors, xs)
    return torch.where(flat.isnan(), joined(otherwise), flat)


def inner_products(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """The inner products <x, y> as one vector: exact if no product of elements is negative, else an upper bound."""
    if len(xs) == 1:
        return (xs[0] * ys[0]).sum().reshape(1)
    return torch.stack(torch._foreach_norm(torch._foreach_mul(xs, ys), 1))


def joined(xs: Sequence[Tensor]) -> Tensor:
    """All elements of all tensors in one flat tensor."""
    return torch.cat([x.flatten() for x in xs])


def parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`joined`: views of ``flat`` in the shapes of ``like``."""
    return [part.view(x.shape) for part, x in zip(torch.split(flat, [x.numel() for x in like]), like, strict=True)]


def spread(values: Tensor, like: Sequence[Tensor]) -> Tensor:
    """A flat tensor that repeats each value once per element of its tensor."""
    return torch.cat([value.expand(x.numel()) for value, x in zip(values.unbind(), like, strict=True)])


def fit(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` cropped, or padded with zeros, to ``shape``; the first axis does not change."""
    change = [new - old for new, old in zip(shape[1:], x.shape[1:], strict=True)]
    return F.pad(x, [side for c in reversed(change) for side in (0, c)])


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``F.pad``, skipped if there is nothing to pad."""
    return F.pad(x, list(padding), mode=mode) if any(padding) else x


def unpad(x: Tensor, size: Sequence[int], padding: Sequence[int], mode: str) -> Tensor:
    """The adjoint of :func:`pad`: each padded element is added to the element that it copies."""
    if not any(padding):
        return x
    if mode == "constant":
        return F.pad(x, [-side for side in padding])
    places = torch.arange(math.prod(size), dtype=torch.float64).reshape(1, *size)
    index = pad(places, padding, mode).long().flatten().to(x.device)
    return x.new_zeros(len(x), math.prod(size)).index_add(1, index, x.flatten(1)).reshape(len(x), *size)


def full_precision(weight: Tensor) -> torch.autocast:
    """A context without autocast on the weight's device."""
    return torch.autocast(weight.device.type, enabled=False)


def lasting(like: Tensor) -> torch.inference_mode:
    """A context without inference mode, unless ``like`` was made in it: inference tensors cannot enter a later backward."""
    return torch.inference_mode(like.is_inference())


def stamp(weight: Tensor) -> tuple[int, int] | None:
    """A value that changes whenever ``weight`` is written or replaced; None if torch counts no writes."""
    if weight.is_inference():
        return None
    try:
        return weight._version, weight.data_ptr()
    except RuntimeError:  # a slice under vmap has no memory of its own
        return None
