"""Haiku's batch normalization, shared by the backbones of DeepMind's ENN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DebiasedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with Haiku's moving averages, which do not depend on an initial value.

    After t batches the average is sum_i d^(t-i) (1-d) s_i / (1 - d^t) over the batches' statistics s_i, so it is an average of
    the data from the first batch on. ``nn.BatchNorm2d`` mixes in its initial mean 0 and variance 1: at VGG's d = 0.999, their weight
    is still 37 % after 1,000 batches. The recorded variance is the batch's, divided by n; ``nn.BatchNorm2d`` divides by n - 1.

    Otherwise it is an ``nn.BatchNorm2d`` with the same names. ``momentum`` is 1 - d, and None makes the average the plain mean.

    Args:
        num_features: Channels C.
        decay: d.
        scale: Whether there is a learned scale. There is always a learned offset.

    Source: ``hk.BatchNorm`` and ``hk.ExponentialMovingAverage`` of Haiku 0.0.17.

    Example:
        >>> norm = DebiasedBatchNorm2d(1, decay=0.999)
        >>> _ = norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 1.0)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, decay: float = 0.9, scale: bool = True) -> None:
        super().__init__(num_features, momentum=1 - decay)
        if not scale:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        """Set the scale to 1 and the offset to 0, and clear the statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], normalized by the batch's statistics in training, and by the averages otherwise."""
        statistics = (self.running_mean, self.running_var, self.num_batches_tracked)
        return debiased_batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


def debiased_batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """:class:`DebiasedBatchNorm2d` as a function; in ``training``, it updates ``mean``, ``variance`` and ``count`` in place."""
    if not training:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
    batch_mean, batch_variance = torch.zeros_like(mean), torch.zeros_like(variance)
    output = F.batch_norm(x, batch_mean, batch_variance, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        count.add_(1)
        batches = count.to(torch.promote_types(mean.dtype, torch.float32))
        # The weight of the old average, d (1 - d^(t-1)) / (1 - d^t), grows from exactly 0 to d.
        if momentum is None:
            kept = (batches - 1) / batches
        else:
            rate = math.log1p(-momentum)
            kept = (1 - momentum) * torch.expm1(rate * (batches - 1)) / torch.expm1(rate * batches)
        size = x.numel() // x.shape[1]
        mean.mul_(kept).add_((1 - kept) * batch_mean)
        variance.mul_(kept).add_((1 - kept) * batch_variance * ((size - 1) / size))
    return output


# Recorded as one call, since a tracer would otherwise update the real averages.
torch.fx.wrap("debiased_batch_norm")
