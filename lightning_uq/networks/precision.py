"""Running statistics: buffers that keep their precision, and sums over the ranks of a distributed training."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """Buffers that stay in float32 when the network around them is cast to half precision."""

    def _apply(self, fn: Any, recurse: bool = True) -> "KeepsPrecision":
        def keep(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            half = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if half else moved

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


def is_alone() -> bool:
    """Whether there is only one rank."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def all_sum(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    if not is_alone():
        dist.all_reduce(x)
    return x
