"""The negative evidence lower bound of variational inference over weights, and the log-likelihoods in it."""

import math

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.true_class import at_class
from lightning_uq.functional.validation import check_positive


def elbo_loss(
    log_likelihood: Tensor,
    kl: Tensor,
    num_train: float,
    temperature: float | None = None,
    input_dim: int | None = None,
) -> Tensor:
    """Negative evidence lower bound of a training sample: kl / num_train - log_likelihood.

    With the Neural Testbed's scaling, the divergence is also multiplied by sqrt(temperature) * input_dim.

    Args:
        log_likelihood: Mean over a batch, in nats: a scalar for one index, or [Z] for each index.
        kl: KL(q || p) of the weights (see :mod:`lightning_uq.functional.variational`): a scalar, or one estimate per index [Z].
        num_train: Number of training samples N.
        temperature: T of the problem that generated the data, if known.
        input_dim: Dimension d of its inputs; requires ``temperature``.

    Returns:
        The loss, of the shape that the two broadcast to. Training minimises its mean over indices.

    Raises:
        InputError: A number is not positive, or only one of ``temperature`` and ``input_dim`` is given.

    Source: Blundell et al., ICML 2015 (arXiv 1505.05424); ``ElboLoss`` of ENN, which does not scale if one of the two
    is missing.

    Example:
        >>> import torch
        >>> elbo_loss(torch.tensor([-1.0, -2.0]), torch.tensor(50.0), num_train=100)
        tensor([1.5000, 2.5000])
        >>> elbo_loss(torch.tensor(-1.0), torch.tensor(50.0), num_train=100, temperature=0.25, input_dim=4)
        tensor(2.)
    """
    check_positive(num_train=num_train)
    scale = 1.0
    if (temperature is None) != (input_dim is None):
        raise InputError("`temperature` and `input_dim` go together, but one of them is None. Pass both or neither.")
    if temperature is not None and input_dim is not None:
        check_positive(temperature=temperature, input_dim=input_dim)
        scale = math.sqrt(temperature) * input_dim
    return kl * (scale / num_train) - log_likelihood


def categorical_log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of log p(target): a scalar for logits [B, C], [Z] for logits [Z, B, C].

    Args:
        logits: [B, C] or [Z, B, C].
        target: Class indices [B].

    Raises:
        InputError: The shapes do not match.

    Example:
        >>> import torch
        >>> categorical_log_likelihood(torch.zeros(3, 5, 2), torch.tensor([0, 1, 1, 0, 1]))
        tensor([-0.6931, -0.6931, -0.6931])
    """
    if logits.ndim not in (2, 3) or target.shape != logits.shape[-2:-1]:
        raise InputError(
            f"`logits` and `target` must be [B, C] or [Z, B, C], and [B], but their shapes are {list(logits.shape)} and "
            f"{list(target.shape)}."
        )
    return at_class(F.log_softmax(upcast(logits), dim=-1), target, -1).mean(-1)


def gaussian_noise_log_likelihood(output: Tensor, target: Tensor, noise_std: float) -> Tensor:
    """-mean((output - target)^2) / (2 noise_std^2): the log-likelihood under Gaussian noise, without its constant.

    Args:
        output: Means [B, D] or [Z, B, D].
        target: Targets [B, D].
        noise_std: Standard deviation of the noise, in units of the target.

    Returns:
        A scalar, or [Z].

    Raises:
        InputError: The shapes do not match, or ``noise_std`` is not positive.

    Source: ``get_awgn_loglike_fn`` of ENN.

    Example:
        >>> import torch
        >>> gaussian_noise_log_likelihood(torch.ones(4, 1), torch.zeros(4, 1), noise_std=0.5)
        tensor(-2.)
    """
    if output.ndim not in (2, 3) or target.shape != output.shape[-2:]:
        raise InputError(
            f"`output` and `target` must be [B, D] or [Z, B, D], and [B, D], but their shapes are {list(output.shape)} "
            f"and {list(target.shape)}."
        )
    check_positive(noise_std=noise_std)
    error = upcast(output) - target
    return -0.5 * error.square().mean((-2, -1)) / noise_std**2
