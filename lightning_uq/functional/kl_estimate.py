"""Divergence of a model's joint prediction from a known environment, estimated from draws.

An environment draws inputs x_1 ... x_tau and their labels, and knows their likelihood log P(y | x, environment). A model's likelihood
is log mean_z prod_t p_z(y_t | x_t). The mean difference of the two over many draws estimates the Kullback-Leibler divergence of the
model's joint prediction from the environment's, in nats and not divided by tau.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.likelihood``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.joint_likelihood import joint_log_likelihood
from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating, check_integer, check_positive, check_shape


class KLEstimate(NamedTuple):
    """An estimated divergence.

    Attributes:
        mean: The estimate in nats: a scalar in float64.
        std: Standard deviation over the draws; not finite if one of them is not.
        num_infinite: Number of infinite draws, each of which counted as the largest finite one.
        num_draws: Number of draws.
    """

    mean: Tensor
    std: Tensor
    num_infinite: int
    num_draws: int


def kl_estimate(true_log_likelihood: Tensor, model_log_likelihood: Tensor) -> KLEstimate:
    """Mean over draws of log P(y | environment) - log P(y | model), as in the testbed.

    A draw to which the model gave probability 0 is infinite. The original counts it as the largest finite one, so that one such draw
    does not hide all others. ``num_infinite`` is their number; a model with infinite draws is worse than its mean says. If no draw is
    finite, the mean is infinite. NaN stays NaN.

    Args:
        true_log_likelihood: [S], of the environment.
        model_log_likelihood: [S], of the model (:func:`joint_log_likelihood`).

    Raises:
        InputError: The shapes differ, or there is no draw.

    Source: ``parse_kl_estimates`` of ``neural_testbed.likelihood.utils``.

    Example:
        >>> estimate = kl_estimate(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-0.5, -1.5, -torch.inf]))
        >>> estimate.mean, estimate.num_infinite
        (tensor(0.5000, dtype=torch.float64), 1)
    """
    check_floating("true_log_likelihood", true_log_likelihood, 1, "[S]")
    check_floating("model_log_likelihood", model_log_likelihood, 1, "[S]")
    if true_log_likelihood.shape != model_log_likelihood.shape or true_log_likelihood.numel() == 0:
        raise InputError(
            f"`model_log_likelihood` must hold one number for each of the {len(true_log_likelihood)} draws "
            f"(at least one), but its shape is {list(model_log_likelihood.shape)}."
        )
    draws = widen(true_log_likelihood) - widen(model_log_likelihood)
    infinite = draws.isposinf()
    largest = draws[draws.isfinite()].max() if bool(draws.isfinite().any()) else draws.new_tensor(math.inf)
    clipped = torch.where(infinite, largest, draws)
    return KLEstimate(clipped.mean(), draws.std(correction=0), int(infinite.sum()), draws.numel())


def uniform_kl(true_log_likelihood: Tensor, num_classes: int, tau: int) -> Tensor:
    """The divergence of equal probabilities for all classes, by which the testbed's leaderboard divides all others.

    Args:
        true_log_likelihood: [S], of the environment, for tau labels each.
        num_classes: C.
        tau: Number of labels predicted together.

    Returns:
        mean(true_log_likelihood) + tau log C, a scalar in float64.

    Example:
        >>> uniform_kl(torch.zeros(3), num_classes=2, tau=10)
        tensor(6.9315, dtype=torch.float64)
    """
    check_integer("num_classes", num_classes, 1)
    check_integer("tau", tau, 1)
    return widen(true_log_likelihood).mean() + tau * math.log(num_classes)


def gaussian_sample_kl(samples: Tensor, target: Tensor, noise_std: float, true_log_likelihood: Tensor) -> KLEstimate:
    """The testbed's divergence for regression: every index predicts its mean, plus noise of the environment's standard deviation.

    Args:
        samples: Predicted means [Z, S, tau].
        target: [S, tau].
        noise_std: Standard deviation of the noise, which the model knows.
        true_log_likelihood: [S], of the environment.

    Raises:
        InputError: ``noise_std`` is not positive, or the shapes do not fit.

    Source: ``GaussianSampleKL`` of ``neural_testbed.likelihood.regression``.

    Example:
        >>> true = torch.full((4,), -0.9189)  # log N(0; 0, 1)
        >>> gaussian_sample_kl(torch.ones(1, 4, 1), torch.zeros(4, 1), noise_std=1.0, true_log_likelihood=true).mean
        tensor(0.5000, dtype=torch.float64)
    """
    check_floating("samples", samples, 3, "[Z, S, tau]")
    check_shape("target", target, samples.shape[1:])
    check_positive(noise_std=noise_std)
    scaled = (widen(samples) - widen(target)) / noise_std
    log_probs = log_density(scaled.square(), 2 * math.log(noise_std))
    return kl_estimate(true_log_likelihood, joint_log_likelihood(log_probs))
