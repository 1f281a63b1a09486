"""The base class of the parametrizations that bound a weight."""

import torch
from torch import Tensor, nn


class Bound(nn.Module):
    """A parametrization that divides a weight so that its layer stretches no input by more than ``coefficient``.

    Args:
        coefficient: The largest norm that the layer may have.

    Attributes:
        handles: Hooks on the layer, which :func:`~lightning_uq.networks.spectral_norm.remove_spectral_norm` removes.
    """

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def is_sized(self) -> bool:
        """Whether everything is known that the norm depends on."""
        return True

    def cold_state(self) -> dict[str, Tensor]:
        """Buffers that belong to newly loaded weights: the next forward computes their norm anew."""
        return {}

    def extra_repr(self) -> str:
        """The settings that ``print`` shows."""
        return f"coefficient={self.coefficient}"
