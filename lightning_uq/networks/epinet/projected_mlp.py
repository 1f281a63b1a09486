"""The MLP of an epinet."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.networks.chunks import in_chunks, indices_at_once
from lightning_uq.networks.initializers import truncated_normal_init_


class ProjectedMLP(nn.Module):
    """An MLP with one output vector per class, which is projected on the index: reshape(MLP([z, h]), [B, C, D_z]) . z.

    All indices run in one batched call; in evaluation, as many at once as suit the device. The product of the first layer with the
    features does not depend on z and is computed once. The weights of the last layer are projected before the product with the batch,
    which saves a factor of D_z.

    Args:
        in_features: Size F of the features [B, F].
        out_features: Size C of the output.
        index_dim: Size D_z of the index.
        hidden_sizes: Widths of the hidden layers, with ReLU. Without hidden layers, the output is at most quadratic in z.
        concat_index: Whether z is also an input of the MLP, before the features. If not, z is only used in the projection.

    Source: Osband et al., arXiv 2107.08924, section 3.3 and ``enn.networks.epinet``; with their initialization.

    Example:
        >>> ProjectedMLP(7, 3, index_dim=5)(torch.zeros(4, 7), torch.zeros(6, 5)).shape
        torch.Size([6, 4, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        index_dim: int,
        *,
        hidden_sizes: Sequence[int] = (50, 50),
        concat_index: bool = True,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.index_dim = index_dim
        self.concat_index = concat_index
        sizes = [in_features + index_dim * concat_index, *hidden_sizes, out_features * index_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        truncated_normal_init_(self)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of features [B, F] for the rows of ``index`` [Z, D_z]."""
        first, last = self.layers[0], self.layers[-1]
        weight: Tensor = first.weight  # type: ignore[assignment]
        features, index = features.to(weight.dtype), index.to(weight)
        split = self.index_dim * self.concat_index
        of_index, of_features = torch.split(weight, [split, weight.shape[1] - split], 1)
        if len(self.layers) == 1:
            shared = F.linear(features, of_features, first.bias)  # type: ignore[arg-type]
            shape = (self.out_features, self.index_dim)
            output = torch.einsum("bcd,zd->zbc", shared.reshape(-1, *shape), index)
            if self.concat_index:
                by_index = F.linear(index, of_index).reshape(-1, *shape)
                output = output + torch.einsum("zcd,zd->zc", by_index, index).unsqueeze(1)
            return output

        # Products with a narrow right-hand side are slow on a CPU, so each column is a row of the batch there.
        by_columns = features.device.type == "cpu"
        if by_columns:
            shared = torch.addmm(first.bias.unsqueeze(1), of_features, features.mT)  # type: ignore[operator]
        else:
            shared = F.linear(features, of_features, first.bias)  # type: ignore[arg-type]

        def run(index: Tensor) -> Tensor:
            by_class = _by_class(last.weight, self.index_dim)
            projected = torch.bmm(index.expand(len(by_class), -1, -1), by_class).transpose(0, 1)  # [Z, C, H]
            bias = F.linear(index, _by_class(last.bias, self.index_dim))
            if self.concat_index:
                h = (shared + F.linear(index, of_index).unsqueeze(2 if by_columns else 1)).relu_()
            else:
                h = shared.relu().unsqueeze(0)  # all indices share it up to the projection
            for layer in self.layers[1:-1]:
                h = (_on_columns(layer, h) if by_columns else layer(h)).relu_()
            h = h.expand(len(index), -1, -1)
            if by_columns:
                return torch.baddbmm(bias.unsqueeze(2), projected, h).mT
            return torch.baddbmm(bias.unsqueeze(1), h, projected.mT)

        if self.training or torch.compiler.is_compiling():
            return run(index)
        return in_chunks(run, index, indices_at_once(features))


def _on_columns(layer: Any, h: Tensor) -> Tensor:
    """A linear layer on the columns of ``h`` [Z, H, B]."""
    return torch.baddbmm(layer.bias.unsqueeze(1), layer.weight.expand(len(h), -1, -1), h)


def _by_class(weight: Any, index_dim: int) -> Tensor:
    """[C D_z, ...] to [C, D_z, ...]."""
    return weight.reshape(-1, index_dim, *weight.shape[1:])  # type: ignore[no-any-return]
