"""An MLP with Gaussian noise of learned size in every unit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.indexers import GaussianIndexer
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.wrapped import check_vectors


class GaussianNoiseMLP(EpistemicNetwork):
    """A ReLU MLP with a Gaussian term in every bias: each layer is W h + b + c * eps, where c is learned.

    The index is the concatenated noise of all units: z = (eps_1, ..., eps_L) ~ N(0, I). The batch shares it, so
    an index is one function of x.

    Args:
        in_features: Size of the flattened input.
        out_features: Classes C, or 2 D for regression: means and raw variances.
        hidden_sizes: Widths of the hidden layers.
        init_scale: Initial value of every c.

    Raises:
        InputError: A size is below 1, ``init_scale`` is negative, or an index is not [Z, number of units].

    Source: ``GaussianNoiseMLP`` of google-deepmind/enn, whose index is a random key.

    Example:
        >>> network = GaussianNoiseMLP(4, 3, hidden_sizes=(8,))
        >>> network.indexer, network(torch.zeros(6, 4), network.sample_index(7)).shape
        (GaussianIndexer(index_dim=11), torch.Size([7, 6, 3]))
    """

    indexer: GaussianIndexer

    def __init__(
        self, in_features: int, out_features: int, *, hidden_sizes: Sequence[int] = (50, 50), init_scale: float = 1.0
    ) -> None:
        widths = [*hidden_sizes, out_features]
        super().__init__(GaussianIndexer(sum(widths)))
        if not 0 <= init_scale < math.inf:
            raise InputError(f"`init_scale` must be a number of at least 0, but it is {init_scale}.")
        mlp = truncated_normal_init_(MLP(in_features, out_features, hidden_sizes=hidden_sizes))
        self.layers = nn.ModuleList(layer for layer in mlp.modules() if isinstance(layer, nn.Linear))
        self.widths = widths
        self.noise_scales = nn.ParameterList(torch.full((width,), float(init_scale)) for width in self.widths)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] for the rows of ``index`` [Z, number of units]."""
        check_vectors(index, self.indexer.index_dim)
        dtype = self.noise_scales[0].dtype
        h = x.flatten(1).to(dtype).unsqueeze(0)
        noise = torch.split(index.to(dtype), self.widths, 1)
        for i, (layer, scale, eps) in enumerate(zip(self.layers, self.noise_scales, noise, strict=True)):
            h = layer(h.relu() if i else h) + (scale * eps).unsqueeze(1)
        return h
