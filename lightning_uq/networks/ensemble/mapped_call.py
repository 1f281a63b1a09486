"""One forward pass over the stacked weights of many networks by ``torch.vmap``, with the dtypes of autocast."""

from __future__ import annotations  # torch 2.6 cannot compile a nested function whose annotations are evaluated

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.calling import takes_by_name
from lightning_uq.networks.output import OutputReader

MAX_WRITTEN_OUT = 32
"""The largest number of networks that an exported graph runs one after the other. For many layers, such as norms and pooling, ``torch.vmap`` would
fix the batch size to that of the example, but a graph of a hundred networks is large."""


def call_mapped(
    network: nn.Module, reader: OutputReader, tensors: Mapping[str, Tensor], x: Any, x_axis: int | None
) -> Tensor:
    """Outputs [M, B, ...] of ``network`` with stacked ``tensors`` [M, ...], by ``torch.vmap``.

    Args:
        network: One member; its values are not used.
        reader: Selects the output tensor.
        tensors: All parameters and buffers by name. If the network changes buffers in place, so does this call.
        x: The input, which the members share (``x_axis`` None), or one stacked input per member (``x_axis`` 0).
        x_axis: Position of the member axis of ``x``.

    Raises:
        UnsupportedError: ``torch.vmap`` cannot map an operation of the network.
    """
    by_name = takes_by_name(network, x)

    def call_one(tensors: dict[str, Tensor], x: Any) -> Tensor:
        if reader.predict_fn is not None:
            named = {f"network.{name}": tensor for name, tensor in tensors.items()}
            called: Tensor = torch.func.functional_call(_Called(network, reader), named, (x,))
            return called
        args, kwargs = ((), x) if by_name else ((x,), {})
        return reader(torch.func.functional_call(network, tensors, args, dict(kwargs)))

    first = next(iter(tensors.values()))
    if _is_exporting() and len(first) <= MAX_WRITTEN_OUT:
        members = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(first))]
        return torch.stack([call_one(own, x if x_axis is None else x[i]) for i, own in enumerate(members)])
    device = first.device.type
    autocast = _AutocastInVmap(device) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    try:
        with autocast:
            output: Tensor = torch.vmap(call_one, in_dims=(0, x_axis), randomness="different")(dict(tensors), x)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UnsupportedError(
            f"execution='vmap' does not support {type(network).__name__}: {error} Use execution='loop'."
        ) from error
    return output


class _Called(nn.Module):
    """Calls a network through the reader's ``predict_fn``, as one module."""

    def __init__(self, network: nn.Module, reader: OutputReader) -> None:
        super().__init__()
        self.network = network
        self.reader = reader

    def forward(self, x: Any) -> Tensor:
        return self.reader.call(self.network, x)


def _is_exporting() -> bool:
    """Whether ``torch.export`` traces this call. False in torch 2.6, which cannot export ``torch.vmap`` anyway."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return exporting is not None and bool(exporting())


class _AutocastInVmap(TorchFunctionMode):
    """Gives mapped layers the dtypes that autocast gives them outside ``torch.vmap``.

    ``torch.vmap`` decomposes a layer before autocast sees it, so its bias or scale would be added in float32.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AUTOCAST_LOW:
            args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype(self.device))
        elif func in _AUTOCAST_NORMS:
            dtype = _norm_dtype(func, args[0].dtype, self.device, torch.get_autocast_dtype(self.device))
            args, kwargs = _cast((args, kwargs), torch.float32)
            return func(*args, **kwargs).to(dtype)
        return func(*args, **kwargs)


_AUTOCAST_LOW = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.addmm, torch.baddbmm, torch.addbmm,
}  # fmt: skip
_AUTOCAST_NORMS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    F.layer_norm: lambda x, weight: F.layer_norm(x, (1,), weight, weight),
    F.rms_norm: lambda x, weight: F.rms_norm(x, (1,), weight),
    F.group_norm: lambda x, weight: F.group_norm(x, 1, weight, weight),
    F.batch_norm: lambda x, weight: F.batch_norm(x, weight.clone(), weight.clone(), weight, weight, True),
}


def _cast(args: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wide else value

    return tree_map(cast, args)


@functools.lru_cache
def _norm_dtype(func: Any, dtype: torch.dtype, device: str, autocast: torch.dtype) -> torch.dtype:
    """The dtype that an unmapped norm returns for this input under the active autocast, measured on a tiny input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that mixed types take a slower kernel
        x = torch.zeros(2, 1, dtype=dtype, device=device)
        return _AUTOCAST_NORMS[func](x, torch.ones(1, device=device)).dtype
