"""A prior whose layers' weights are linear in the index."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.mlp import check_sizes


class PriorIndependentLayers(nn.Module):
    """A frozen MLP g(x, z) in which each layer's weights are linear in its own slice of z.

    Layer l uses its slice z_l of the index: weights sum_i w_i z_li and biases sum_i b_i z_li, where the vector w of each weight
    and b of each bias has length one. All layers but the first divide their weights by sqrt(fan_in). If z has fewer entries than
    layers, every layer uses all of z. The weights are buffers.

    Args:
        in_features: Input dimension d; inputs are flattened.
        out_features: C.
        index_dim: Dimension of z.
        hidden_sizes: Widths of the hidden layers, with ReLU.
        weight_scaling: Variance of a generated weight, per unit of |z_l|^2.
        bias_scaling: Variance of a generated bias, per unit of |z_l|^2.
        bias: Constant added to b after its normalization.
        seed: Seed of the weights; None uses the global generator.

    Raises:
        InputError: A size is below 1, or an input or index has another size.

    Source: ``PriorMLPIndependentLayers`` of ``enn.networks.hypermodels``.

    Example:
        >>> prior = PriorIndependentLayers(4, 3, index_dim=6, seed=0)
        >>> prior(torch.zeros(5, 4), torch.randn(7, 6)).shape, list(prior.parameters())
        (torch.Size([7, 5, 3]), [])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        index_dim: int,
        hidden_sizes: Sequence[int] = (10,),
        weight_scaling: float = 1.0,
        bias_scaling: float = 1.0,
        bias: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_sizes, out_features]
        check_integer("index_dim", index_dim, 1)
        check_sizes(in_features=in_features, hidden_sizes=hidden_sizes, out_features=out_features)
        self.in_features = in_features
        self.index_dim = index_dim
        self.num_layers = len(sizes) - 1
        self.weight_scaling = weight_scaling
        self.bias_scaling = bias_scaling
        self.bias = bias
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for i, ((a, b), part) in enumerate(
            zip(itertools.pairwise(sizes), self._split(torch.zeros(1, index_dim)), strict=True)
        ):
            self.register_buffer(f"weight_{i}", torch.randn(b, a, part.shape[1], generator=generator))
            self.register_buffer(f"bias_{i}", torch.randn(b, part.shape[1], generator=generator))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] for the rows of ``index`` [Z, index_dim]."""
        if index.ndim != 2 or index.shape[1] != self.index_dim:
            raise InputError(f"`index` must be [Z, {self.index_dim}], but its shape is {list(index.shape)}.")
        h = x.flatten(1)
        if h.shape[1] != self.in_features:
            raise InputError(
                f"The prior's input must have {self.in_features} features (`in_features`), but it has {h.shape[1]}."
            )
        for i, part in enumerate(self._split(index)):
            # Normalized here, so that a state dict or ENN's weights can be loaded unchanged.
            weight = F.normalize(self.get_buffer(f"weight_{i}"), dim=-1, eps=0) * math.sqrt(self.weight_scaling)
            bias = F.normalize(self.get_buffer(f"bias_{i}"), dim=-1, eps=0) * math.sqrt(self.bias_scaling) + self.bias
            if i:
                weight = weight / math.sqrt(weight.shape[1])
                h = h.relu()
            part = part.to(weight)
            weights = torch.einsum("oki,zi->zko", weight, part)
            h = torch.matmul(h.to(weights.dtype), weights) + torch.einsum("oi,zi->zo", bias, part).unsqueeze(1)
        return h

    def _split(self, index: Tensor) -> Sequence[Tensor]:
        if self.index_dim < self.num_layers:
            return [index] * self.num_layers
        return torch.tensor_split(index, self.num_layers, dim=1)
