"""Divergences of variational inference over a network's weights, in nats, summed over the weights.

Each is KL(q || p) between a variational distribution q and a prior p over P weights. An evidence lower bound divides it by the
number of training samples; see :func:`~lightning_uq.losses.elbo_loss`.
"""

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.validation import check_positive, check_shape

_RIDGE = 1e-6  # added to W W^T, as in the original


def diagonal_gaussian_kl(mean: Tensor, std: Tensor, prior_std: float = 1.0) -> Tensor:
    """KL(N(mean, diag(std^2)) || N(0, prior_std^2 I)), a scalar.

    sum_p [(std_p^2 + mean_p^2) / prior_std^2 - 1 - 2 log(std_p / prior_std)] / 2.

    Args:
        mean: Means of the P weights, of any shape.
        std: Standard deviations of the weights, above zero, of the same shape.
        prior_std: Standard deviation of the prior.

    Raises:
        InputError: The shapes differ, or ``prior_std`` is not positive.

    Source: Blundell et al., ICML 2015 (arXiv 1505.05424); ``get_analytical_diagonal_linear_model_prior_kl_fn`` of ENN.

    Example:
        >>> diagonal_gaussian_kl(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    check_shape("std", std, mean.shape)
    check_positive(prior_std=prior_std)
    mean, std = upcast(mean) / prior_std, upcast(std) / prior_std
    std = std.clamp_min(torch.finfo(std.dtype).tiny)  # a softplus can underflow, and log 0 would be infinite
    return 0.5 * (std.square() + mean.square() - 1 - 2 * std.log()).sum()


def scale_mixture_log_prob(
    weights: Tensor, prior_std: float, second_prior_std: float = 1.0, mixture_weight: float = 1.0
) -> Tensor:
    """log p(weights), summed over the last axis, where the prior of each weight is a mixture of two zero-mean Gaussians.

    p(w) = mixture_weight N(w; 0, prior_std^2) + (1 - mixture_weight) N(w; 0, second_prior_std^2).

    Args:
        weights: [..., P].
        prior_std: Standard deviation of the first component.
        second_prior_std: Standard deviation of the second component.
        mixture_weight: Probability of the first component, in [0, 1].

    Returns:
        Log-densities [...].

    Raises:
        InputError: A standard deviation is not positive, or the probability is out of range.

    Source: Blundell et al., arXiv 1505.05424, equation 7.

    Example:
        >>> scale_mixture_log_prob(torch.zeros(2), prior_std=1.0)  # 2 log N(0; 0, 1)
        tensor(-1.8379)
    """
    check_positive(prior_std=prior_std, second_prior_std=second_prior_std)
    if not 0 <= mixture_weight <= 1:
        raise InputError(f"`mixture_weight` must lie in [0, 1], but it is {mixture_weight}.")
    weights = upcast(weights)
    parts = [
        math.log(weight) + _gaussian_log_prob(weights, 0.0, std)
        for weight, std in ((mixture_weight, prior_std), (1 - mixture_weight, second_prior_std))
        if weight > 0
    ]
    log_prob: Tensor = torch.logsumexp(torch.stack(parts), dim=0).sum(-1)
    return log_prob


def sampled_kl(
    weights: Tensor,
    mean: Tensor,
    std: Tensor,
    prior_std: float,
    second_prior_std: float = 1.0,
    mixture_weight: float = 1.0,
) -> Tensor:
    """log q(weights) - log p(weights) for draws from a diagonal Gaussian q; its mean over draws estimates KL(q || p).

    The prior p is a scale mixture (:func:`scale_mixture_log_prob`), for which the divergence has no closed form.

    Args:
        weights: Draws [..., P] from q.
        mean: Means of q [P].
        std: Standard deviations of q [P], above zero.
        prior_std: Standard deviation of the prior's first component.
        second_prior_std: Standard deviation of its second component.
        mixture_weight: Probability of the first component.

    Returns:
        One number per draw, [...].

    Raises:
        InputError: The shapes do not match, or a number is out of range.

    Source: Blundell et al., arXiv 1505.05424, equation 2; ``get_sample_based_model_prior_kl_fn`` of ENN.

    Example:
        >>> sampled_kl(torch.zeros(3), torch.zeros(3), torch.ones(3), prior_std=1.0)
        tensor(0.)
    """
    check_shape("std", std, mean.shape)
    if weights.shape[-1:] != mean.shape:
        raise InputError(
            f"`weights` must be [..., {mean.numel()}], like `mean`, but its shape is {list(weights.shape)}."
        )
    log_prior = scale_mixture_log_prob(weights, prior_std, second_prior_std, mixture_weight)
    mean, std = upcast(mean), upcast(std)
    std = std.clamp_min(torch.finfo(std.dtype).tiny)
    return _gaussian_log_prob(upcast(weights), mean, std).sum(-1) - log_prior


def linear_hypermodel_kl(weight: Tensor, bias: Tensor, prior_std: float = 1.0) -> Tensor:
    """The divergence of a linear hypermodel's weights u = z W + b, z ~ N(0, prior_std^2 I), from N(0, prior_std^2 I).

    u varies only in the span of the D rows of W. Within it, with A = W W^T + 1e-6 I, the divergence is

    [tr A - D - log det A + b^T W^T A^-1 W b / prior_std^2] / 2.

    The part of b outside of the span is not counted (the divergence there is infinite for any b).

    Args:
        weight: W [D, P].
        bias: b [P].
        prior_std: Standard deviation of the index z and of the prior of the weights u.

    Returns:
        A scalar.

    Raises:
        InputError: The shapes do not match, or ``prior_std`` is not positive.

    Source: ``get_analytical_linear_model_prior_kl_fn`` of ENN; Dwaracherla et al., arXiv 2006.07464.

    Example:
        >>> linear_hypermodel_kl(torch.eye(2, 5), torch.tensor([1.0, 0.0, 0.0, 0.0, 9.0])).round(decimals=4)
        tensor(0.5000)
    """
    if weight.ndim != 2 or bias.shape != weight.shape[1:]:
        raise InputError(
            f"`weight` and `bias` must be [D, P] and [P], but their shapes are {list(weight.shape)} and {list(bias.shape)}."
        )
    check_positive(prior_std=prior_std)
    dtype = upcast(weight).dtype
    weight, bias = widen(weight), widen(bias)  # if rows are alike, A is singular except for its ridge
    square = weight @ weight.mT + _RIDGE * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    factor = torch.linalg.cholesky(square)
    log_det = 2 * factor.diagonal().log().sum()
    projected = torch.linalg.solve_triangular(factor, (weight @ bias).unsqueeze(1), upper=False) / prior_std
    kl: Tensor = 0.5 * (square.trace() - len(weight) - log_det + projected.square().sum())
    return kl.to(dtype)


def _gaussian_log_prob(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    return log_density(((x - mean) / std).square(), 2 * log_std)
