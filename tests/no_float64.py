"""A device without float64, such as MPS, on a machine that has none: conversions to float64 are refused."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

from lightning_uq.functional import precision


class _Refusal(TorchFunctionMode):
    """Refuses to convert tensors to float64, except copies on the host (results of ``Tensor.cpu``) and what is computed from them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*args[1:], *kwargs.values()]
        dtypes = [g.dtype if isinstance(g, torch.Tensor) else g for g in given] if func is torch.Tensor.to else []
        made = func is not torch.Tensor.to and kwargs.get("device") and kwargs.get("dtype") == torch.float64
        first = args[0][0] if args and isinstance(args[0], tuple | list) and args[0] else args[0] if args else None
        on_host = any(getattr(one, "on_host", False) for one in (first, *given))
        if (func is torch.Tensor.double or torch.float64 in dtypes or made) and not on_host:
            raise TypeError("Cannot make a float64 tensor: the device does not support it.")
        result = func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            result = result.view_as(result)  # the tensor on the device stays there
        if func is torch.Tensor.cpu or on_host:
            for part in result if isinstance(result, tuple | list) else [result]:
                if isinstance(part, torch.Tensor):
                    part.on_host = True
        return result


@contextlib.contextmanager
def device_without_float64(monkeypatch):
    """Within it, the CPU is a device without float64."""
    with monkeypatch.context() as patch:
        patch.setattr(precision, "DEVICES_WITHOUT_FLOAT64", frozenset({"cpu"}))
        with _Refusal():
            yield
