"""Values at the true class: the one gather behind every log-likelihood of labels."""

import torch
from torch import Tensor


def at_class(values: Tensor, target: Tensor, dim: int) -> Tensor:
    """The entries of ``values`` at the classes ``target`` along the axis ``dim``, which is dropped.

    Args:
        values: Values of all classes, such as log-probabilities [Z, B, C, ...].
        target: Class indices of the shape of ``values`` without ``dim``; leading axes may be missing, as the members' of [B, ...].
        dim: The class axis.

    Example:
        >>> at_class(torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]]]), torch.tensor([1]), dim=2)
        tensor([[1.],
                [3.]])
    """
    dim %= values.ndim
    index = target.long().expand(values.shape[:dim] + values.shape[dim + 1 :]).unsqueeze(dim)
    return torch.gather(values, dim, index).squeeze(dim)
