"""Kullback-Leibler divergences between two categorical or two Gaussian distributions."""

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """sum_c p_c log(p_c / q_c) over the last axis; classes with p_c = 0 add nothing.

    Args:
        p: Probabilities [..., C].
        q: Probabilities [..., C].

    Returns:
        [...] in nats; infinite if q_c = 0 for a class with p_c > 0.

    Example:
        >>> categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor(0.6931, dtype=torch.float64)
    """
    p, q = widen(p), widen(q)
    terms: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return terms.sum(-1)


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)), elementwise.

    For a Gaussian process problem, the ENN paper's score is the mean over inputs of this divergence from the exact posterior
    (:func:`~lightning_uq.data.gp_posterior`) to a model's moments over z, with 0.001 added to both standard deviations.

    Example:
        >>> gaussian_kl(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
        tensor(0.5000, dtype=torch.float64)
    """
    mean, std, other_mean, other_std = map(widen, (mean, std, other_mean, other_std))
    ratio = std / other_std
    return 0.5 * (ratio.square() + ((mean - other_mean) / other_std).square() - 1) - ratio.log()
