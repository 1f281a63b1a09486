"""Out-of-distribution scores from member logits [Z, B, C]; for all of them, higher means more out of distribution.

Each takes logits [Z, B, C] (or [Z, B, C, ...]) and returns [B] (or [B, ...]); half precision is upcast to float32. :data:`SCORES`
maps names to scores. None of them reliably separates epistemic from aleatoric uncertainty, so each is named after what it
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_uq.functional.entropy import expected_entropy, mean_log_probs, mutual_information, predictive_entropy
from lightning_uq.functional.ood_features import gen
from lightning_uq.functional.precision import upcast


def max_softmax(logits: Tensor) -> Tensor:
    """1 - max_c of the mean probabilities.

    Source: Hendrycks & Gimpel, ICLR 2017 (arXiv 1610.02136).

    Example:
        >>> max_softmax(torch.tensor([[[0.0, 0.0]]]))
        tensor([0.5000])
    """
    # Summed over the other classes: 1 - max would round to 0 for all very confident rows, and so tie them.
    probs = mean_log_probs(logits).exp()
    return probs.scatter(1, probs.argmax(1, keepdim=True), 0.0).sum(1)


def energy(logits: Tensor) -> Tensor:
    """Free energy -log sum_c exp(l_c) at temperature 1, the mean of the members' energies.

    The energy depends on the additive constant that a softmax ignores. Therefore the members' energies are averaged, each with its
    own constant; the energy of mean logits would be a different score.

    Source: Liu et al., NeurIPS 2020 (arXiv 2010.03759).

    Example:
        >>> energy(torch.tensor([[[0.0, 0.0]]]))
        tensor([-0.6931])
    """
    return -torch.logsumexp(upcast(logits), 2).mean(0)


def max_logit(logits: Tensor) -> Tensor:
    """Minus the largest of the mean logits.

    Source: Hendrycks et al., ICML 2022 (arXiv 1911.11132).

    Example:
        >>> max_logit(torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]]))
        tensor([-2.])
    """
    return -upcast(logits).mean(0).amax(1)


def variation_ratio(logits: Tensor) -> Tensor:
    """Share of members whose label is not the most frequent one; 0 for a single member.

    Source: Freeman (1965); Gal et al., ICML 2017 (arXiv 1703.02910).

    Example:
        >>> variation_ratio(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.3333])
    """
    labels = logits.argmax(2)  # [Z, B, ...]
    votes = torch.zeros_like(upcast(logits[0])).movedim(1, 0)
    votes = votes.scatter_add(0, labels, torch.ones_like(labels, dtype=votes.dtype))
    return 1 - votes.amax(0) / len(logits)


SCORES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "predictive_entropy": predictive_entropy,
        "mutual_information": mutual_information,
        "expected_entropy": expected_entropy,
        "max_softmax": max_softmax,
        "energy": energy,
        "max_logit": max_logit,
        "variation_ratio": variation_ratio,
        "gen": gen,
    }
)

NEED_LOGITS = ("energy", "max_logit")
"""Scores that depend on the constant that a softmax ignores, so they cannot be computed from probabilities."""
