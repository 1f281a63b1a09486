"""Counts what would wait for a GPU, on the CPU, where a clock cannot see it."""

import sys
import traceback
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::bincount",
    "aten::masked_select",
}
"""Operators whose result, or the shape of it, the program needs before it can go on."""


class Operations(TorchDispatchMode):
    """Counts operators while it is entered.

    Attributes:
        names: How often each was called.
        waits: Those that wait for the device, by the places in this package that asked for them.
    """

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        self.names[name] += 1
        if name in WAITING or name.startswith("aten::_unique") or self._by_mask(name, args):
            stack = traceback.extract_stack()
            ours = [one for one in stack if "/lightning_uq/" in one.filename]
            if ours and not any("/torch/optim/" in one.filename for one in stack):  # its step counts lie on the CPU
                self.waits[f"{name} at {_last(ours)}"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(name, args):
        """Rows that a mask chooses have to be counted first."""
        return name in ("aten::index", "aten::index_put_") and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )


def _last(frames):
    """The places in this package that led there, the last one first."""
    return " < ".join(f"{one.filename.split('/lightning_uq/')[-1]}:{one.lineno}" for one in frames[:-5:-1])


def as_on_a_gpu(monkeypatch):
    """Let the package take the CPU for a device on which reading a value waits."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_uq.") and hasattr(module, "is_free"):
            monkeypatch.setattr(module, "is_free", lambda values: False)
