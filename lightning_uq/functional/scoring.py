"""Proper scores of a categorical prediction, row by row."""

from __future__ import annotations

from torch import Tensor

from lightning_uq.functional.precision import upcast
from lightning_uq.functional.true_class import at_class


def negative_log_likelihood(probs: Tensor, target: Tensor) -> Tensor:
    """-log p_y in nats; infinite if the true class has a probability of exactly 0.

    Args:
        probs: Probabilities [N, C].
        target: Class indices [N].

    Returns:
        [N]; lower is better.

    Example:
        >>> import torch
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        tensor([0.6931])
    """
    return -upcast(at_class(probs, target, 1)).log()


def brier_score(probs: Tensor, target: Tensor) -> Tensor:
    """sum_c (p_c - 1[y = c])^2, in [0, 2]: the sum over classes, as defined by Brier, not the mean.

    Args:
        probs: Probabilities [N, C].
        target: Class indices [N].

    Returns:
        [N]; lower is better.

    Source: Brier, Monthly Weather Review 78 (1950).

    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1, 1]))
        tensor([0.5000, 2.0000])
    """
    probs = upcast(probs)
    true = at_class(probs, target, 1)
    # (1 - p_y)^2 + sum_{c != y} p_c^2, because 1 - 2 p_y + sum p^2 would cancel for a confident row.
    others = probs.square().scatter(1, target[:, None], 0.0).sum(1)
    return (1 - true).square() + others
