"""The information-theoretic decomposition of a categorical prediction, in nats and in log space.

With member logits l_z and p_z = softmax(l_z):

- predictive entropy  H[mean_z p_z]
- expected entropy    mean_z H[p_z]
- mutual information  H[mean_z p_z] - mean_z H[p_z]  >= 0

All take logits [Z, B, C, ...] with the class axis at 2 and return [B, ...]; half precision is upcast to float32.

Source: Houlsby et al., arXiv 1112.5745; Depeweg et al., ICML 2018.
"""

import math

import torch
from torch import Tensor

from lightning_uq.functional.precision import upcast


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """``log_softmax`` in at least float32."""
    return torch.log_softmax(upcast(logits), dim)


def entropy(log_probs: Tensor, dim: int) -> Tensor:
    """Shannon entropy -sum p log p of log-probabilities along ``dim``; a probability of exactly 0 contributes 0.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log(), 1)
        tensor([-0.0000, 0.6931])
    """
    probs = log_probs.exp()
    return -(probs * log_probs.where(probs > 0, 0.0)).sum(dim)


def mean_log_probs(logits: Tensor) -> Tensor:
    """Log of the mean probabilities, log mean_z softmax(l_z): [Z, B, C, ...] -> [B, C, ...]."""
    return torch.logsumexp(log_softmax(logits, 2), 0) - math.log(logits.shape[0])


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction, H[mean_z p_z], in nats: [Z, B, C, ...] -> [B, ...].

    Example:
        >>> predictive_entropy(torch.tensor([[[0.0, 0.0]]]))
        tensor([0.6931])
    """
    return entropy(mean_log_probs(logits), 1)


def expected_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the members, mean_z H[p_z], in nats: [Z, B, C, ...] -> [B, ...]."""
    return entropy(log_softmax(logits, 2), 2).mean(0)


def mutual_information(logits: Tensor) -> Tensor:
    """Mutual information of label and index in nats: [Z, B, C, ...] -> [B, ...].

    Computed as the mean Kullback-Leibler divergence mean_z KL(p_z || mean p), which equals H[mean p] - mean H[p_z]
    without its cancellation, hence never negative beyond rounding; clamped at 0.

    Example:
        >>> members = torch.tensor([[[20.0, -20.0]], [[-20.0, 20.0]]])  # two members that disagree
        >>> mutual_information(members)
        tensor([0.6931])
    """
    log_probs = log_softmax(logits, 2)
    mean = torch.logsumexp(log_probs, 0) - math.log(logits.shape[0])
    probs = log_probs.exp()
    divergence = (probs * (log_probs - mean).where(probs > 0, 0.0)).sum(2)
    return divergence.mean(0).clamp_min(0)
