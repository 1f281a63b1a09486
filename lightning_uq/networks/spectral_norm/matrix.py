"""The bound of a weight that acts as a matrix."""

import torch
from torch import Tensor

from lightning_uq.networks.spectral_norm.power_iteration import PowerIteration


class MatrixNorm(PowerIteration):
    """The weight [out, ...] as a matrix [out, rest]: a linear layer, a 1x1 convolution, or any kernel reshaped.

    Args:
        weight: The weight to bound.
        coefficient: The largest allowed norm of the matrix.
        n_power_iterations: Steps of the power iteration in each training forward.
        n_warmup_iterations: Steps at the first forward.
    """

    def __init__(self, weight: Tensor, coefficient: float, n_power_iterations: int, n_warmup_iterations: int) -> None:
        rows, columns = weight.flatten(1).shape
        super().__init__(weight, [rows], [columns], coefficient, n_power_iterations, n_warmup_iterations, eps=0.0)

    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        """The product W v."""
        return weight.flatten(1).mv(v)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """The product W^T u."""
        return weight.flatten(1).T.mv(u)

    def gradient(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The outer product of u and v."""
        return torch.outer(u, v).view(weight.shape)

    def read_original(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u and v unchanged, since the original code saves the same vectors."""
        return u, v
