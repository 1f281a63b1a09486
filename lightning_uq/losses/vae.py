"""The loss of a variational auto-encoder: KL(q(latent | x) || N(0, I)) - E log p(x | latent), averaged over a batch."""

from torch import Tensor
from torch.nn import functional as F

from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_floating, check_shape


def binary_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of independent binary inputs, summed over the inputs and averaged over the batch, in nats.

    Args:
        x: Inputs [B, D] in [0, 1].
        logits: Logits [B, D] of the probability of a one.

    Raises:
        InputError: The shapes differ.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014 (arXiv 1312.6114), appendix C.1.

    Example:
        >>> import torch
        >>> binary_log_likelihood(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
        tensor(-1.3863)
    """
    _check_same(x=x, logits=logits)
    return -F.binary_cross_entropy_with_logits(upcast(logits), upcast(x), reduction="none").sum(1).mean()


def gaussian_vae_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, exp(log_variance)), summed over the inputs and averaged over the batch, in nats.

    Args:
        x: Inputs [B, D].
        mean: [B, D].
        log_variance: [B, D].

    Raises:
        InputError: The shapes differ.

    Source: Kingma & Welling, arXiv 1312.6114, appendix C.2.

    Example:
        >>> import torch
        >>> gaussian_vae_log_likelihood(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        tensor(-0.9189)
    """
    _check_same(x=x, mean=mean, log_variance=log_variance)
    x, mean, log_variance = upcast(x), upcast(mean), upcast(log_variance)
    return log_density((x - mean).square() * (-log_variance).exp(), log_variance).sum(1).mean()


def latent_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)), summed over the latents and averaged over the batch, in nats.

    Args:
        mean: [B, L].
        log_variance: [B, L].

    Raises:
        InputError: The shapes differ.

    Source: Kingma & Welling, arXiv 1312.6114, appendix B.

    Example:
        >>> import torch
        >>> latent_kl(torch.ones(1, 2), torch.zeros(1, 2))
        tensor(1.)
    """
    _check_same(mean=mean, log_variance=log_variance)
    mean, log_variance = upcast(mean), upcast(log_variance)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def _check_same(**tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    check_floating(first, like, 2, "[B, D]")
    for name, tensor in others:
        check_floating(name, tensor, 2, "[B, D]")
        check_shape(name, tensor, like.shape)
