"""Log-likelihood of several labels together: log of the mean over z of their product."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating


def joint_log_likelihood(log_probs: Tensor | Iterable[Tensor]) -> Tensor:
    """log mean_z prod_t p_z(y_t | x_t), for each of S draws of tau labels.

    Args:
        log_probs: Log-probabilities of the true labels [Z, S, tau], whole or in parts along Z, which are read in order,
            so that a thousand indices need not be in memory at once.

    Returns:
        [S], in float64.

    Raises:
        InputError: There is no index.

    Source: ``calculate_joint_ll`` of ``enn.metrics.joint``.

    Example:
        >>> halves = torch.log(torch.tensor([[[0.9, 0.9]], [[0.1, 0.1]]]))
        >>> joint_log_likelihood(halves).exp()
        tensor([0.4100], dtype=torch.float64)
    """
    total: Tensor | None = None
    count = 0
    for part in [log_probs] if isinstance(log_probs, Tensor) else log_probs:
        check_floating("log_probs", part, 3, "[Z, S, tau]")
        if len(part) == 0:
            continue
        summed = widen(part).sum(2).logsumexp(0)
        total = summed if total is None else torch.logaddexp(total, summed)
        count += len(part)
    if total is None:
        raise InputError("`log_probs` must hold at least one index z, but it holds none.")
    return total - math.log(count)


def log_sum_product(weights: Tensor, probs: Tensor) -> Tensor:
    """log sum_k w_k prod_t q_kt; terms with weight 0 are ignored, even if q is 0.

    Args:
        weights: w [K], non-negative.
        probs: q [K, T].

    Returns:
        A scalar in float64.

    Example:
        >>> log_sum_product(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[0.9, 0.9], [0.1, 0.1], [0.0, 0.0]])).exp()
        tensor(0.4100, dtype=torch.float64)
    """
    used = weights > 0
    return (widen(weights[used]).log() + widen(probs[used]).log().sum(1)).logsumexp(0)
