"""The components of a predicted distribution: weighted Gaussian or Student-t distributions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import widen
from lightning_uq.functional.student_t import student_t_log_prob


class Components(NamedTuple):
    """The marginal of each target as a mixture of M components.

    Attributes:
        location: Locations [M, ...].
        scale: Scales [M, ...], positive.
        log_weight: Logarithms of the weights [M, ...], which sum to 1 over M.
        degrees_of_freedom: Degrees of freedom of Student-t components [M, ...]; None for Gaussians.
    """

    location: Tensor
    scale: Tensor
    log_weight: Tensor
    degrees_of_freedom: Tensor | None = None

    def log_density(self, value: Tensor) -> Tensor:
        """Log-density [...] of values [...], in float64.

        Example:
            >>> one = torch.ones(1, 1)
            >>> Components(0 * one, one, 0 * one).log_density(torch.zeros(1))
            tensor([-0.9189], dtype=torch.float64)
        """
        value, location, scale = widen(value), widen(self.location), widen(self.scale)
        if self.degrees_of_freedom is None:
            members = log_density(((value - location) / scale).square(), 2 * scale.log())
        else:
            members = student_t_log_prob(value, self.degrees_of_freedom, location, scale)
        return torch.logsumexp(widen(self.log_weight) + members, 0)
