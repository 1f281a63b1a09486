"""The wider dtypes of computations, for devices with and without float64.

- :func:`upcast` for values of single samples: half precision becomes float32.
- :func:`widen` for sums over a data set, tails of distributions and differences that cancel: float64, or float32 on a
  device without float64.
- :func:`to_float64` for fits that need more than float32: float64 for any device, on the CPU if necessary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has no float64.

    Example:
        >>> wide_dtype("cpu"), wide_dtype("mps")
        (torch.float64, torch.float32)
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return torch.float32 if kind in DEVICES_WITHOUT_FLOAT64 else torch.float64


def upcast(x: Tensor) -> Tensor:
    """``x`` in at least float32: float64 stays float64.

    Example:
        >>> upcast(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def upcast_together(*tensors: Tensor) -> list[Tensor]:
    """The tensors in a common dtype: float64 if one of them is float64, otherwise float32.

    Example:
        >>> [x.dtype for x in upcast_together(torch.zeros(1).half(), torch.zeros(1).double())]
        [torch.float64, torch.float64]
    """
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def widen(x: Tensor) -> Tensor:
    """``x`` in the :func:`wide_dtype` of its device.

    Example:
        >>> widen(torch.ones(2, dtype=torch.bool))
        tensor([1., 1.], dtype=torch.float64)
    """
    return x.to(wide_dtype(x.device))


def to_float64(x: Tensor) -> Tensor:
    """``x`` in float64 without its graph, on the CPU if its device has no float64.

    Example:
        >>> to_float64(torch.ones(1, requires_grad=True))
        tensor([1.], dtype=torch.float64)
    """
    return to_wide_device(x).to(torch.float64)


def to_wide_device(x: Tensor) -> Tensor:
    """``x`` without its graph, on the CPU if its device has no float64, so that parts of it can be widened in turn.

    Example:
        >>> to_wide_device(torch.ones(1, requires_grad=True))
        tensor([1.])
    """
    x = x.detach()
    return x if wide_dtype(x.device) == torch.float64 else x.cpu()


def move_only(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` on the device of ``fn(x)``, in its own dtype; for the ``_apply`` of buffers that keep their precision.

    A float64 tensor becomes float32 on a device without float64.

    Example:
        >>> move_only(torch.Tensor.half, torch.zeros(1)).dtype
        torch.float32
    """
    try:
        moved = fn(x)
    except TypeError:  # raised by torch for float64 on a device that does not support it
        if x.dtype != torch.float64:
            raise
        return fn(x.float())
    if moved.dtype == x.dtype:
        return moved
    return (x.to(wide_dtype(moved.device)) if x.dtype == torch.float64 else x).to(moved.device)


def move_wide(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` on the device of ``fn(x)``, but still in float64. It is not moved if that device has no float64.

    Example:
        >>> move_wide(torch.Tensor.half, torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    try:
        moved = fn(x)
    except TypeError:  # raised by torch for float64 on a device that does not support it
        return x
    if moved.dtype == x.dtype:
        return moved
    return x.to(moved.device) if wide_dtype(moved.device) == torch.float64 else x
