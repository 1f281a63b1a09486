"""Random functions that resemble draws from a Gaussian process, as priors for any network."""

import math

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.mlp import check_sizes
from lightning_uq.networks.precision import KeepsPrecision
from lightning_uq.networks.priors.additive import AdditivePrior

Gamma = float | tuple[float, float]


class RandomFeatureGP(KeepsPrecision):
    r"""A draw from a Gaussian process by F random features: scale * sum_k alpha_k cos(gamma w_k . x + b_k).

    With w ~ N(0, I), b ~ U[0, 2 pi) and alpha ~ N(0, 1 / F), and a separate draw of w and b for each output, its covariance is
    scale^2 / 2 * exp(-gamma^2 ||x - x'||^2 / 2). It is not trained, and its numbers are buffers. It can be the ``prior`` of a
    :class:`~lightning_uq.networks.NetworkWithPrior` and as one of the functions of an
    :class:`~lightning_uq.networks.AdditivePrior` or :class:`~lightning_uq.networks.ChoicePrior`.

    Args:
        in_features: Size of the flattened input.
        num_outputs: C.
        num_features: F.
        gamma: Inverse length scale. For a pair (low, high), one is drawn per feature, uniformly.
        scale: Factor of the output.
        generator: Source of randomness.

    Raises:
        InputError: A size is below 1, or ``gamma`` is neither a number nor a pair low <= high.

    Source: Rahimi & Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007; ``make_random_feat_gp`` of
    google-deepmind/enn.

    Example:
        >>> prior = RandomFeatureGP(4, 3, gamma=(0.5, 2.0))
        >>> prior(torch.zeros(6, 4)).shape, list(prior.parameters())
        (torch.Size([6, 3]), [])
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    gamma: Tensor

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        *,
        num_features: int = 100,
        gamma: Gamma = 1.0,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, num_outputs=num_outputs, num_features=num_features)
        self.scale = scale
        self.register_buffer("weight", torch.randn(num_features, in_features, num_outputs, generator=generator))
        self.register_buffer("bias", 2 * math.pi * torch.rand(num_features, num_outputs, generator=generator))
        self.register_buffer("alpha", torch.randn(num_features, generator=generator) / math.sqrt(num_features))
        low, high = _range(gamma)
        if low == high:
            drawn = torch.full((num_features, 1), low)
        else:
            drawn = low + (high - low) * torch.rand(num_features, 1, generator=generator)
        self.register_buffer("gamma", drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Values [B, C] at x [B, ...]; computed in float32 if ``x`` has half precision or autocast is on."""
        with torch.autocast(x.device.type, enabled=False):
            flat = x.flatten(1).to(self.weight.dtype)
            phase = self.gamma * torch.einsum("bi,kio->bko", flat, self.weight) + self.bias
            output = self.scale * torch.einsum("bko,k->bo", phase.cos(), self.alpha)
        return output.to(x.dtype) if x.is_floating_point() else output


class NullFunction(nn.Module):
    """Zeros [B, C]: the function of an index entry without a prior.

    Args:
        num_outputs: C.

    Example:
        >>> NullFunction(3)(torch.ones(2, 4))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: Tensor) -> Tensor:
        """Zeros [B, C] for x [B, ...]."""
        return torch.zeros(
            x.shape[0], self.num_outputs, device=x.device, dtype=x.dtype if x.is_floating_point() else None
        )


def gp_prior(
    in_features: int,
    num_outputs: int,
    index_dim: int,
    num_features: int = 100,
    gamma: Gamma = 1.0,
    scale: float = 1.0,
    seed: int | None = None,
) -> AdditivePrior:
    """An :class:`~lightning_uq.networks.AdditivePrior` of K = ``index_dim`` random-feature Gaussian processes.

    Args:
        in_features: Size of the flattened input.
        num_outputs: C.
        index_dim: K.
        num_features: Number of random features of each function.
        gamma: Inverse length scale, or a range to draw it from.
        scale: Factor of each function.
        seed: Seed of the functions; None uses the global generator.

    Example:
        >>> gp_prior(10, 2, index_dim=8, seed=0)(torch.zeros(3, 10), torch.randn(5, 8)).shape
        torch.Size([5, 3, 2])
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return AdditivePrior(
        RandomFeatureGP(
            in_features, num_outputs, num_features=num_features, gamma=gamma, scale=scale, generator=generator
        )
        for _ in range(index_dim)
    )


def _range(gamma: Gamma) -> tuple[float, float]:
    low, high = gamma if isinstance(gamma, tuple | list) and len(gamma) == 2 else (gamma, gamma)
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low <= high < math.inf:
        raise InputError(f"`gamma` must be a number or a pair (low, high), but it is {gamma!r}.")
    return float(low), float(high)
