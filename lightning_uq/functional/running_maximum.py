"""The running maximum of a row, with operators that ONNX supports; it has none for ``cummax``."""

import torch
from torch import Tensor


def running_maximum(x: Tensor) -> Tensor:
    """The maximum up to each position of the last axis: [..., C]. In a graph, it takes log2(C) maxima of shifted rows.

    Example:
        >>> running_maximum(torch.tensor([1, 3, 2, 5, 4]))
        tensor([1, 3, 3, 5, 5])
    """
    if not torch.compiler.is_compiling():
        return x.cummax(-1).values
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[..., :step], torch.maximum(x[..., step:], x[..., :-step])], -1)
        step *= 2
    return x
