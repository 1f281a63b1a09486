"""Negative log-likelihood of a mixture density network, and the layout of its parameters in one output tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.mixture import gaussian_log_prob
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.gaussian import MIN_VARIANCE
from lightning_uq.losses.reduction import Reduction, reduce


def split_mixture(output: Tensor, num_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the weights, means and variances, each [..., D, K], of an output [..., 3 K D], in that order.

    Each of the three blocks holds the D numbers of the first component, then those of the next. variance = softplus(raw) + 1e-6.
    Half precision is upcast to float32.

    Raises:
        InputError: The last axis is not a multiple of 3 K.

    Example:
        >>> [tuple(part.shape) for part in split_mixture(torch.zeros(5, 12), 2)]
        [(5, 2, 2), (5, 2, 2), (5, 2, 2)]
    """
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % (3 * num_components):
        raise InputError(
            f"`output` must have shape [..., {3 * num_components} D], logits, means and raw variances of {num_components} "
            f"components each, but its shape is {list(output.shape)}."
        )
    blocks = upcast(output).unflatten(-1, (3, num_components, -1)).transpose(-1, -2)  # type: ignore[no-untyped-call]
    logits, mean, raw = blocks.unbind(-3)
    return logits, mean, F.softplus(raw) + MIN_VARIANCE


def mixture_nll_loss(
    logits: Tensor, mean: Tensor, variance: Tensor, target: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Negative log-density of a mixture of K weighted Gaussians per target: -log sum_k w_k N(y; mu_k, sigma_k^2), in nats.

    Args:
        logits: Logits of the weights [B, D, K].
        mean: Means of the same shape.
        variance: Variances of the same shape, above zero.
        target: Targets [B, D].
        reduction: ``"mean"`` over all targets, ``"sum"``, or ``"none"`` for [B, D].

    Raises:
        InputError: The shapes do not fit together, or ``reduction`` is unknown.

    Source: Bishop, "Mixture density networks", NCRG/94/004 (1994).

    Example:
        >>> zeros, ones = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> mixture_nll_loss(zeros, zeros, ones, torch.zeros(1, 1))
        tensor(0.9189)
    """
    check_shape("mean", mean, logits.shape)
    check_shape("variance", variance, logits.shape)
    check_shape("target", target, logits.shape[:-1])
    log_prob = gaussian_log_prob(mean, variance, target.unsqueeze(-1))
    return reduce(-torch.logsumexp(upcast(logits).log_softmax(-1) + log_prob, -1), reduction)
