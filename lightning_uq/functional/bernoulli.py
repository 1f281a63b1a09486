"""The information-theoretic decomposition of independent Bernoulli predictions, in nats and in log space.

With hypotheses' logits l_z and p_z = sigmoid(l_z), element by element:

- predictive entropy  H[mean_z p_z]
- expected entropy    mean_z H[p_z]
- mutual information  H[mean_z p_z] - mean_z H[p_z]  >= 0

Log-probabilities of both outcomes are used, log p = -softplus(-l) and log(1 - p) = -softplus(l), so probabilities close to 0 or 1
keep their digits. Logits have the index axis first, [Z, ...]; half precision is upcast to float32.
"""

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.functional.entropy import log_mean_exp, mean_divergence
from lightning_uq.functional.precision import upcast, widen


def log_probs_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of p = sigmoid(l).

    Example:
        >>> import torch
        >>> log_probs_of(torch.tensor([0.0, 2.0]))
        (tensor([-0.6931, -0.1269]), tensor([-0.6931, -2.1269]))
    """
    logits = upcast(logits)
    return -F.softplus(-logits), -F.softplus(logits)


def pooled_logits(logits: Tensor) -> Tensor:
    """The logit of the mean probability, log mean_z p_z - log mean_z (1 - p_z): [Z, ...] -> [...].

    Example:
        >>> import torch
        >>> pooled_logits(torch.tensor([[2.0], [-2.0]]))
        tensor([0.])
    """
    on, off = log_probs_of(logits)
    return log_mean_exp(on) - log_mean_exp(off)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy -p log p - (1 - p) log(1 - p) of p = sigmoid(l), in nats.

    Example:
        >>> import torch
        >>> bernoulli_entropy(torch.tensor([0.0, 40.0]))
        tensor([6.9315e-01, 1.7418e-16])
    """
    on, off = log_probs_of(logits)
    return -_weighted(on, on) - _weighted(off, off)


def bernoulli_expected_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the hypotheses, mean_z H[p_z], in nats: [Z, ...] -> [...].

    Example:
        >>> import torch
        >>> bernoulli_expected_entropy(torch.tensor([[0.0], [0.0]]))
        tensor([0.6931])
    """
    return bernoulli_entropy(logits).mean(0)


def bernoulli_mutual_information(logits: Tensor) -> Tensor:
    """Mutual information between outcome and index in nats: [Z, ...] -> [...].

    It is computed as the mean Kullback-Leibler divergence mean_z KL(p_z || mean p), in float64 if the device supports it, from
    non-negative parts: see :func:`~lightning_uq.functional.entropy.mean_divergence`.

    Source: Houlsby et al. (arXiv 1112.5745).

    Example:
        >>> import torch
        >>> bernoulli_mutual_information(torch.tensor([[20.0], [-20.0]]))  # two members that disagree
        tensor([0.6931])
    """
    on, off = log_probs_of(widen(logits))
    return (mean_divergence(on) + mean_divergence(off)).to(upcast(logits).dtype)


def joint_energy(logits: Tensor) -> Tensor:
    """-sum_l log(1 + exp(l)) over the last axis, averaged over hypotheses: [Z, B, L] -> [B].

    Source: Wang et al., "Can multi-label classification networks know what they don't know?", NeurIPS 2021 (arXiv 2109.14162).

    Example:
        >>> import torch
        >>> joint_energy(torch.zeros(1, 1, 2))
        tensor([-1.3863])
    """
    return -F.softplus(upcast(logits)).sum(-1).mean(0)


def _weighted(log_prob: Tensor, value: Tensor) -> Tensor:
    """p times a value; 0 where p is 0, even if the value is infinite."""
    probs = log_prob.exp()
    return probs * value.where(probs > 0, 0.0)
