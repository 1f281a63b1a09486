"""Centered inputs and scaled outputs for any epistemic network."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.softplus import inverse_softplus_exp, log_softplus
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.precision import KeepsPrecision
from lightning_uq.networks.wrapped import WrappedNetwork

_EPS = 1e-9


class Standardize(KeepsPrecision):
    """(x - mean) / (std + 1e-9), by fixed statistics.

    A constant feature is centered but not scaled, since division by 1e-9 would blow up its first variation.

    Args:
        mean: Mean [...] of one input.
        std: Standard deviation of the same shape.

    Raises:
        InputError: The shapes differ, or the numbers are not valid statistics.

    Example:
        >>> Standardize(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0]))(torch.tensor([[5.0, 6.0]]))
        tensor([[2., 1.]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if mean.shape != std.shape:
            raise InputError(
                f"`mean` and `std` must have the same shape, but their shapes are {list(mean.shape)} and {list(std.shape)}."
            )
        if not bool((mean.isfinite() & std.isfinite() & (std >= 0)).all()):
            raise InputError("`mean` and `std` must be finite, and `std` must not be negative.")
        self.register_buffer("mean", mean.detach().float())
        std = std.detach().float()
        self.register_buffer("scale", torch.where(std > 0, std + _EPS, torch.ones_like(std)))

    def forward(self, x: Tensor) -> Tensor:
        """Standardized x [B, ...], in its own precision."""
        output = (x.to(self.mean.dtype) - self.mean) / self.scale
        return output.to(x.dtype) if x.is_floating_point() else output


class CenteredNetwork(WrappedNetwork):
    """f((x - mean) / (std + 1e-9), z): an epistemic network with inputs standardized by statistics of the training data.

    Args:
        network: The network f(x, z).
        mean: Mean [...] of the training inputs, elementwise.
        std: Standard deviation of the same shape; where it is 0, the input is only centered.

    Raises:
        InputError: The statistics are invalid.

    Source: ``make_centered_enn`` of google-deepmind/enn, which divides a constant feature by 1e-9.

    Example:
        >>> from lightning_uq.networks import DeterministicNetwork
        >>> x_train = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
        >>> network = CenteredNetwork.from_data(DeterministicNetwork(torch.nn.Identity()), x_train)
        >>> network(torch.tensor([[4.0, 8.0]]), torch.tensor([0]))
        tensor([[[2., 1.]]])
    """

    def __init__(self, network: EpistemicNetwork, mean: Tensor, std: Tensor) -> None:
        super().__init__(network)
        self.standardize = Standardize(mean, std)

    @classmethod
    def from_data(cls, network: EpistemicNetwork, x_train: Tensor) -> "CenteredNetwork":
        """Compute the statistics of ``x_train`` [N, ...], in float64 if the device supports it. The standard deviation divides by N.

        Raises:
            InputError: ``x_train`` has no batch axis or no rows.
        """
        if x_train.ndim < 2 or not len(x_train):
            raise InputError(f"`x_train` must be [N, ...] with N at least 1, but its shape is {list(x_train.shape)}.")
        x = widen(x_train.detach())
        return cls(network, x.mean(0), x.std(0, correction=0))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of raw inputs x [B, ...]."""
        output: Tensor = self.network(self.standardize(x), index)
        return output

    def learned_and_prior(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: the trained part and the priors."""
        return self.network.learned_and_prior(self.standardize(x), index)


class ScaledNetwork(WrappedNetwork):
    """scale * f(x, z): an epistemic network with its output in other units.

    Args:
        network: The network f(x, z).
        scale: The factor; to divide logits by a temperature T, pass 1 / T.
        heads: ``"gaussian"`` for outputs [Z, B, 2 D]: means are multiplied by ``scale``, and variances, the softplus of the raw
            outputs, by its square. None multiplies the whole output.

    Raises:
        InputError: ``scale`` is not a positive number, or ``heads`` is unknown.

    Source: ``scale_enn_output`` of google-deepmind/enn.

    Example:
        >>> from lightning_uq.networks import DeterministicNetwork
        >>> network = ScaledNetwork(DeterministicNetwork(torch.nn.Identity()), 10.0)
        >>> network(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
        tensor([[[10., 20.]]])
    """

    def __init__(self, network: EpistemicNetwork, scale: float, *, heads: Literal["gaussian"] | None = None) -> None:
        super().__init__(network)
        if not 0 < scale < math.inf:
            raise InputError(f"`scale` must be a positive number, but it is {scale}.")
        if heads not in ("gaussian", None):
            raise InputError(f"`heads` must be 'gaussian' or None, but it is {heads!r}.")
        self.scale = scale
        self.heads = heads

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Scaled outputs [Z, B, ...]."""
        return self._scale(self.network(x, index))

    def learned_and_prior(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: the trained part and the priors; with heads, including their variances."""
        learned, prior = self.network.learned_and_prior(x, index)
        scaled = self._scale(learned)
        return scaled, self._scale(learned + prior) - scaled

    def _scale(self, output: Tensor) -> Tensor:
        if self.heads is None:
            return output * self.scale
        mean, raw = output.chunk(2, -1)
        return torch.cat([mean * self.scale, inverse_softplus_exp(log_softplus(raw) + 2 * math.log(self.scale))], -1)
