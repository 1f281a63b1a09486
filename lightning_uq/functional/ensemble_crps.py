"""The continuous ranked probability score of a few numbers, such as the means of an ensemble."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.functional.precision import upcast_together


def empirical_crps(members: Tensor, target: Tensor) -> Tensor:
    """CRPS of the distribution that gives each of Z numbers the same probability, elementwise, in the target's units.

    mean_z |x_z - y| - 1/2 mean_{z,z'} |x_z - x_z'|; for one number it is the absolute error. The second mean is computed from the
    sorted numbers, sum_{z,z'} |x_z - x_z'| = 2 sum_i (2 i - Z - 1) x_(i), in O(Z log Z).

    Args:
        members: Numbers x [Z, ...].
        target: y [...].

    Returns:
        [...]; lower is better.

    Source: Gneiting & Raftery, JASA 102 (2007), equation 21.

    Example:
        >>> empirical_crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        tensor([0.5000])
    """
    members, target = upcast_together(members, target)
    num = len(members)
    # Centred, because the weighted sum of large numbers would cancel.
    ordered = (members - members.mean(0)).sort(0).values
    rank = torch.arange(1, num + 1, dtype=members.dtype, device=members.device)
    weights = ((2 * rank - num - 1) / num**2).reshape(-1, *[1] * target.ndim)
    return (members - target).abs().mean(0) - (weights * ordered).sum(0)
