"""The base class of the parametrizations that bound a weight."""

import torch
from torch import Tensor, nn


class Bound(nn.Module):
    """A parametrization that divides a weight so that its layer stretches no input by more than ``coefficient``.

    Args:
        coefficient: The largest allowed norm of the layer.

    Attributes:
        handles: Hooks on the layer, which :func:`~lightning_uq.networks.spectral_norm.remove_spectral_norm` removes.
    """

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def is_sized(self) -> bool:
        """Whether the norm can be computed, because the size of the input is known if it matters."""
        return True

    def cold_state(self) -> dict[str, Tensor]:
        """The buffers for newly loaded weights, whose norm the next forward computes."""
        return {}

    def extra_repr(self) -> str:
        """The settings for ``print``."""
        return f"coefficient={self.coefficient}"
