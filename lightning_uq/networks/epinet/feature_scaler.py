"""Running statistics that standardize features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.functional.precision import widen
from lightning_uq.networks.precision import KeepsPrecision, all_sum, is_alone

_SMALLEST_SPREAD = 0.1  # of a feature, relative to the root mean square over features


class FeatureScaler(KeepsPrecision):
    """Standardizes features by running statistics, in training and in evaluation.

    The statistics are the mean over the first batches, and then an exponential average; with ``momentum=0``, they remain the mean
    over all batches. They are summed over the ranks, so all ranks agree. A feature that hardly varies is divided
    by a tenth of the average spread of features, so that a rarely active feature does not explode.

    Args:
        num_features: F.
        momentum: Weight of a batch once 1 / (number of batches) is below it.

    Example:
        >>> scaler = FeatureScaler(1)
        >>> scaler(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
        >>> scaler.eval()(torch.tensor([[4.0]]))
        tensor([[2.]])
    """

    running_mean: Tensor
    running_var: Tensor
    running_batches: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.tracking = True
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("running_batches", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F], each with a mean of about 0 and a variance of about 1."""
        features = features.to(self.running_var.dtype)
        if self.training and self.tracking:
            self._update(features.detach())
        variance = self.running_var.maximum(_SMALLEST_SPREAD**2 * self.running_var.mean())
        variance = variance.masked_fill(variance == 0, 1.0)
        return F.batch_norm(
            features, self.running_mean, variance, eps=0.0
        )  # one operator, where the formula takes three

    def _update(self, features: Tensor) -> None:
        variance, mean = _moments(features)
        self.running_batches += 1
        weight = self.running_batches.reciprocal().clamp_min(self.momentum).to(mean.dtype)
        # The new variance is (1 - w) v + w (variance + (1 - w) shift^2), and (1 - w) shift is the remaining shift after the step of the mean.
        shift = mean - self.running_mean
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(torch.addcmul(variance, shift, mean - self.running_mean), weight)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean [F] of the rows [B, F] of all ranks."""
    if is_alone():
        return torch.var_mean(x, 0, correction=0)
    wide = widen(x)  # the squares below cancel
    variance, mean = torch.var_mean(wide, 0, correction=0)
    count = wide.new_full((1,), len(x))
    sums = all_sum(torch.cat([count, count * mean, count * (variance + mean.square())]))
    mean, square = (sums[1:] / sums[0]).chunk(2)
    return (square - mean.square()).clamp_min(0).to(x.dtype), mean.to(x.dtype)
