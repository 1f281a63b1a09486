"""The gradient of what several members share."""

from typing import Any

import torch
from torch import Tensor


def share_gradient(x: Tensor, num_members: int) -> Tensor:
    """The tensor itself, whose gradient is divided by the number of members: a sum of their losses then acts as the mean.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> share_gradient(x, 4).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.2500])
    """
    shared: Tensor = _ShareGradient.apply(x, num_members)
    return shared


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.number, None
