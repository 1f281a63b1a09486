"""The bound of a BatchNorm layer, whose norm has a closed form."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.networks.spectral_norm.bound import Bound
from lightning_uq.networks.spectral_norm.tensors import full_precision


class BatchNormBound(Bound):
    """gamma -> gamma / max(1, s / coefficient), with s the largest |gamma| / sqrt(running_var + eps).

    Args:
        layer: The BatchNorm layer.
        coefficient: The largest allowed s of the layer.
    """

    def __init__(self, layer: nn.Module, coefficient: float) -> None:
        super().__init__(coefficient)
        self._layer = (layer,)  # in a tuple, so that the layer does not become a submodule of its own parametrization

    def forward(self, weight: Tensor) -> Tensor:
        """The bounded scale."""
        layer: Any = self._layer[0]
        with full_precision(weight):
            gamma = weight.to(torch.promote_types(weight.dtype, torch.float32))
            stretch = (gamma * (layer.running_var.to(gamma.dtype) + layer.eps).rsqrt()).abs().max()
            bounded: Tensor = gamma / (stretch / self.coefficient).clamp(min=1)
            return bounded.to(weight.dtype)
