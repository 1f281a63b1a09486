"""The scale of a prior, as a spread over the index in units of the output."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen
from lightning_uq.networks.precision import KeepsPrecision, all_sum

# Number of indices z for measuring the spread of a prior.
SPREAD_DRAWS = 256


class PriorScale(KeepsPrecision):
    """Scales a prior by its spread over z.

    The spread is the root mean square, over inputs and outputs, of the prior's standard deviation over z. It is measured
    once, on the first training batch of all ranks, and then fixed.

    Args:
        scale: The spread, in units of the output (logits). Before the measurement, it is a factor of the prior.

    Example:
        >>> prior = PriorScale(2.0)
        >>> prior.measure(torch.tensor([[[-3.0]], [[3.0]]]))
        >>> prior(torch.tensor([[[-3.0]], [[3.0]]])).std(0).round(decimals=3)
        tensor([[2.]])
    """

    running_spread: Tensor
    running_factor: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.measured = False
        self.register_buffer("running_spread", torch.zeros(()))
        # scale / spread, which a step would compute in four operators.
        self.register_buffer("running_factor", torch.tensor(float(scale)), persistent=False)

    def measure(self, prior: Tensor) -> None:
        """Use the spread of the prior's outputs [Z, B, C] as the unit."""
        variance = widen(prior.detach()).var(0)
        sums = all_sum(torch.stack([variance.sum(), variance.new_tensor(variance.numel())]))
        self.running_spread.copy_((sums[0] / sums[1]).sqrt())
        self._set_factor()
        self.measured = True

    def forward(self, prior: Tensor) -> Tensor:
        """scale * prior / spread, [Z, B, C]."""
        return prior * self.running_factor.to(prior.dtype)

    def _set_factor(self) -> None:
        spread = self.running_spread.masked_fill(self.running_spread == 0, 1.0)
        self.running_factor.copy_(self.scale / spread)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_factor()
        self.measured = bool(self.running_spread > 0)
