"""The intensity for shrinking a covariance towards a multiple of the identity."""

import torch
from torch import Tensor


def oas_intensity(covariance: Tensor, freedom: float) -> Tensor:
    """The intensity in [0, 1] for shrinking an unbiased covariance S towards (tr S / D) I.

    For S [D, D] with nu degrees of freedom it is the oracle-approximating intensity

        r = ((1 - 2/D) |S|_F^2 + tr(S)^2) / ((nu + 1 - 2/D) (|S|_F^2 - tr(S)^2 / D)).

    For the variances S [D] of a diagonal model, it is the oracle intensity for a Gaussian, whose variances have errors of variance
    2 sigma^4 / nu, with unbiased estimates of its terms:

        r = 2 / (nu + 2) (1 - 1/D) |S|^2 / (|S|^2 - (sum S)^2 / D).

    Args:
        covariance: [D, D], or [D] for a diagonal.
        freedom: nu, the number of rows minus one.

    Returns:
        A scalar; 1 if S is a multiple of the identity, 0 if D = 1.

    Source: Chen et al., IEEE TSP 58 (2010), equation 23.

    Example:
        >>> oas_intensity(torch.diag(torch.tensor([1.0, 3.0, 5.0])), freedom=20.0).round(decimals=3)
        tensor(0.5700)
    """
    D = covariance.shape[-1]
    squared = covariance.square().sum()
    trace = (covariance if covariance.ndim == 1 else covariance.diagonal()).sum()
    if D == 1:
        return torch.zeros_like(trace)
    anisotropy = squared - trace.square() / D
    if covariance.ndim == 1:
        excess = 2 / (freedom + 2) * (1 - 1 / D) * squared
    else:
        excess = ((1 - 2 / D) * squared + trace.square()) / (freedom + 1 - 2 / D)
    return torch.where(excess < anisotropy, excess / anisotropy, 1.0)
