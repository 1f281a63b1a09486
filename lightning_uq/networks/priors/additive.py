"""Additive priors: a sum of frozen functions, weighted by the entries of the index."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.convolutions import ChannelsLast, ConvFunction
from lightning_uq.networks.priors.frozen import freeze_as_buffers


class AdditivePrior(nn.Module):
    """A frozen random function that is linear in the index: sum_k z_k g_k(x).

    Args:
        functions: The K functions g_k, each x [B, ...] to [B, C]; their parameters become buffers, in place.

    Raises:
        InputError: There is no function, or an index does not have K entries.

    Source: Osband et al., arXiv 2107.08924, section 3.2 (``combine_functions_linear_in_index`` in their code).

    Example:
        >>> prior = AdditivePrior([nn.Linear(2, 3) for _ in range(4)])
        >>> prior(torch.zeros(5, 2), torch.randn(7, 4)).shape
        torch.Size([7, 5, 3])
    """

    def __init__(self, functions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.functions = nn.ModuleList(freeze_as_buffers(function) for function in functions)
        if not len(self.functions):
            raise InputError("`functions` must hold at least one module, but it is empty.")

    def train(self, mode: bool = True) -> "AdditivePrior":
        """Do nothing: the functions are not trained and stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] for the rows of ``index`` [Z, K]; each function runs once."""
        if index.ndim != 2 or index.shape[1] != len(self.functions):
            raise InputError(f"`index` must be [Z, {len(self.functions)}], but its shape is {list(index.shape)}.")
        outputs = torch.stack([function(x) for function in self.functions])
        return torch.einsum("zk,kbc->zbc", index.to(outputs), outputs)


def mlp_prior(
    in_features: int, num_outputs: int, index_dim: int, hidden_sizes: Sequence[int] = (5, 5), seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` of K = ``index_dim`` small MLPs over flattened inputs.

    Args:
        in_features: Input dimension d.
        num_outputs: C.
        index_dim: K.
        hidden_sizes: Widths of each MLP's hidden layers; the testbed's are (5, 5).
        seed: Seed of the weights; None uses the global generator.

    Example:
        >>> mlp_prior(10, 2, index_dim=8, seed=0)(torch.zeros(3, 10), torch.randn(5, 8)).shape
        torch.Size([5, 3, 2])
    """
    return _prior(
        lambda: nn.Sequential(nn.Flatten(), MLP(in_features, num_outputs, hidden_sizes=hidden_sizes)), index_dim, seed
    )


def cifar_conv_prior(num_outputs: int, index_dim: int, in_channels: int = 3, seed: int | None = None) -> AdditivePrior:
    """An :class:`AdditivePrior` of K convolutional networks on 32 x 32 images: channels 4, 8, 4, kernels 5, strides 2.

    Example:
        >>> cifar_conv_prior(10, index_dim=2)(torch.zeros(3, 3, 32, 32), torch.randn(5, 2)).shape
        torch.Size([5, 3, 10])
    """
    return _prior(lambda: ConvFunction(num_outputs, in_channels=in_channels), index_dim, seed)


def imagenet_conv_prior(
    num_outputs: int = 1000, index_dim: int = 30, in_channels: int = 3, seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` on 224 x 224 images: channels 4, 8, 8, kernels 10, 10, 3, strides 5, 5, 2.

    Example:
        >>> imagenet_conv_prior(index_dim=2)(torch.zeros(1, 3, 224, 224), torch.randn(5, 2)).shape
        torch.Size([5, 1, 1000])
    """
    channels, kernels, strides = (4, 8, 8), (10, 10, 3), (5, 5, 2)
    return _prior(
        lambda: ConvFunction(num_outputs, channels, kernels, strides, image_size=224, in_channels=in_channels),
        index_dim,
        seed,
    )


def imagenet_mlp_prior(
    num_outputs: int = 1000, index_dim: int = 30, in_channels: int = 3, seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` of MLPs (50, 50) on 224 x 224 images after average pooling with 10 x 10 windows and stride 5.

    Example:
        >>> imagenet_mlp_prior(index_dim=2)(torch.zeros(1, 3, 224, 224), torch.randn(5, 2)).shape
        torch.Size([5, 1, 1000])
    """

    def function() -> nn.Module:
        # Flattened with channels last, like the original's images.
        windows = nn.Sequential(nn.AvgPool2d(10, 5), ChannelsLast(), nn.Flatten())
        return nn.Sequential(windows, MLP(43 * 43 * in_channels, num_outputs, hidden_sizes=(50, 50)))

    return _prior(function, index_dim, seed)


def _prior(function: Callable[[], nn.Module], index_dim: int, seed: int | None) -> AdditivePrior:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return AdditivePrior(truncated_normal_init_(function(), generator) for _ in range(index_dim))
