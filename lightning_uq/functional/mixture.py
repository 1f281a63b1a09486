r"""Mixtures of Gaussians: the predictions of ensembles of regressors (equal weights) and of mixture density networks.

All functions take component means and variances [Z, B, D] and work elementwise: the D target dimensions are independent given the
index, and further axes may lie between B and D. Half precision is upcast to float32. The optional argument ``weights`` holds the
components' probabilities [Z, B, D]; the default is equal weights.
"""

import math

import torch
from torch import Tensor

from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import upcast_together, widen


def mixture_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, D] of the mixture.

    mu* = mean_z mu_z and sigma*^2 = mean_z sigma_z^2 + mean_z (mu_z - mu*)^2. The textbook form
    mean(sigma^2 + mu^2) - mu*^2 is mathematically equal, but becomes negative in float32 for large |mu|.

    Source: Lakshminarayanan et al., arXiv 1612.01474.

    Example:
        >>> mixture_moments(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[3.0]]]))
        (tensor([[1.]]), tensor([[3.]]))
    """
    mean, variance = upcast_together(mean, variance)
    center = mean.mean(0)
    return center, variance.mean(0) + (mean - center).square().mean(0)


def gaussian_log_prob(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    """log N(value; mean, variance), elementwise, including the term -log(2 pi)/2."""
    mean, variance, value = upcast_together(mean, variance, value)
    return log_density((value - mean).square() / variance, variance.log())


def mixture_log_prob(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """log mean_z N(target; mu_z, sigma_z^2), elementwise [B, D].

    Example:
        >>> mixture_log_prob(torch.zeros(2, 1, 1), torch.ones(2, 1, 1), torch.zeros(1, 1))
        tensor([[-0.9189]])
    """
    log_prob: Tensor = torch.logsumexp(gaussian_log_prob(mean, variance, target), 0) - math.log(mean.shape[0])
    return log_prob


def mixture_cdf(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor | None = None) -> Tensor:
    """P(Y <= value) = mean_z Phi((value - mu_z) / sigma_z), elementwise [B, D]."""
    mean, variance, value = upcast_together(mean, variance, value)
    return _average(torch.special.ndtr((value - mean) * variance.rsqrt()), weights)


def mixture_quantile(mean: Tensor, variance: Tensor, level: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """The value [B, D] with ``mixture_cdf(value) = level``, by bisection, in float64 if the device has it.

    The quantile of a mixture lies between the smallest and the largest of its components' quantiles, which bracket the root; 64
    halvings reach float64 resolution.

    Args:
        mean: Component means [Z, B, D].
        variance: Component variances [Z, B, D].
        level: Probability in (0, 1), a number or a tensor that broadcasts to [B, D].
        weights: Probabilities of the components.

    Example:
        >>> mixture_quantile(torch.tensor([[[-1.0]], [[1.0]]]), torch.ones(2, 1, 1), 0.5).abs() < 1e-6
        tensor([[True]])
    """
    dtype = upcast_together(mean, variance)[0].dtype
    mean, variance = widen(mean), widen(variance)
    probability = torch.as_tensor(level, dtype=mean.dtype, device=mean.device)
    components: Tensor = mean + variance.sqrt() * torch.special.ndtri(probability)
    low, high = components.amin(0), components.amax(0)
    for _ in range(64):
        middle = low + (high - low) / 2
        below = mixture_cdf(mean, variance, middle, weights) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + (high - low) / 2).to(dtype)


def mixture_crps(mean: Tensor, variance: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of the mixture, elementwise [B, D], in the target's units; lower is better.

    It has a closed form. With A(m, s^2) = 2 s phi(m/s) + m (2 Phi(m/s) - 1), the mean of |N(m, s^2)|:
    CRPS = mean_z A(y - mu_z, sigma_z^2) - 1/2 mean_{z,z'} A(mu_z - mu_z', sigma_z^2 + sigma_z'^2).

    Source: Grimit et al., Q. J. R. Meteorol. Soc. 132 (2006).

    Example:
        >>> mixture_crps(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1))
        tensor([[0.2337]])
    """
    mean, variance, target = upcast_together(mean, variance, target)
    to_target = _average(_mean_absolute(target - mean, variance), weights)
    # One row of the pair matrix at a time, which keeps memory at [Z, B, D].
    pairs = zip(mean, variance, strict=True)
    between = torch.stack([_average(_mean_absolute(m - mean, v + variance), weights) for m, v in pairs])
    return to_target - 0.5 * _average(between, weights)


def _average(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the components."""
    return values.mean(0) if weights is None else (values * weights.to(values.dtype)).sum(0)


def _mean_absolute(mean: Tensor, variance: Tensor) -> Tensor:
    scale = variance.sqrt()
    z = mean / scale
    density = log_density(z.square(), 0.0).exp()
    absolute: Tensor = 2 * scale * density + mean * (2 * torch.special.ndtr(z) - 1)
    return absolute
