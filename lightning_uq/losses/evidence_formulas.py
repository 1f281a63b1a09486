"""Formulas of the evidential losses: each maps checked rows of evidence [N, C, ...] to values [N, ...]."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.dirichlet import expected_squared_error, kl_to_uniform, log_rising_factorial_ratio
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_at_least
from lightning_uq.losses.evidence_rows import EvidenceRows

Risk = Literal["sse", "nll", "cross_entropy"]
Fisher = Literal["original", "paper"]


def check_p_norm(p_norm: float) -> None:
    """Refuse a p that is not a finite number of at least 1."""
    if isinstance(p_norm, bool) or not 1 <= p_norm < math.inf:
        raise InputError(f"`p_norm` must be a finite number of at least 1, but it is {p_norm!r}.")


def regularized(
    loss: Tensor, rows: EvidenceRows, reg_factor: float, regularizer: Callable[[EvidenceRows], Tensor]
) -> Tensor:
    """The loss plus ``reg_factor`` times the regularizer, which is skipped for a factor of 0."""
    check_at_least("reg_factor", reg_factor, 0)
    return loss + reg_factor * regularizer(rows) if reg_factor > 0 else loss


def squared_error(rows: EvidenceRows, alpha: Tensor) -> Tensor:
    """(y_c - alpha_c / S)^2 for each class, [N, C, ...]."""
    total = alpha.sum(1, keepdim=True)
    if rows.soft:
        return (rows.hot - alpha / total).square()
    # For the true class, 1 - p equals the sum of the others; a difference would lose digits.
    rest = rows.others(alpha).sum(1, keepdim=True)
    return (torch.where(rows.hot, rest, alpha) / total).square()


def variance(rows: EvidenceRows, alpha: Tensor) -> Tensor:
    """Variance of each class probability under Dir(alpha), [N, C, ...]."""
    total = alpha.sum(1, keepdim=True)
    mean = alpha / total
    return mean * (1 - mean) / (total + 1)


def sum_of_squares(rows: EvidenceRows) -> Tensor:
    """E ||y - p||^2 under Dir(e + 1)."""
    if not rows.soft:
        return expected_squared_error(rows.evidence, rows.hot)
    alpha = rows.evidence + 1
    return (squared_error(rows, alpha) + variance(rows, alpha)).sum(1)


def negative_log_likelihood(rows: EvidenceRows) -> Tensor:
    """log S - log alpha_y."""
    alpha = rows.evidence + 1
    return torch.log1p(rows.others(alpha).sum(1) / rows.true(alpha))


def cross_entropy(rows: EvidenceRows) -> Tensor:
    """sum_c y_c (psi(S) - psi(alpha_c)), computed in float64."""
    alpha = rows.wide().evidence + 1
    risk = rows.true(torch.digamma(alpha.sum(1, keepdim=True)) - torch.digamma(alpha))
    return risk.to(rows.evidence.dtype)


def misleading_kl(rows: EvidenceRows) -> Tensor:
    """KL divergence of the evidence for the wrong classes from the uniform Dirichlet."""
    return kl_to_uniform(rows.others(rows.evidence))


def p_norm_bound(rows: EvidenceRows, p_norm: float) -> Tensor:
    """(E[(1 - p_y)^p] + sum_{j != y} E[p_j^p])^(1/p)."""
    hot = rows.hot.bool()
    alpha = rows.evidence + 1
    rest = alpha.masked_fill(hot, 0.0).sum(1, keepdim=True)
    moments = log_rising_factorial_ratio(torch.where(hot, rest, alpha), alpha.sum(1, keepdim=True), p_norm)
    return torch.exp(torch.logsumexp(moments, 1) / p_norm)


def fisher_information(rows: EvidenceRows, fisher: Fisher) -> Tensor:
    """1/2 sum_{j != y} (alpha_j - 1)^2 (psi'(alpha_j) - psi'(A)), computed in float64."""
    hot = rows.hot.bool()
    wrong = widen(rows.evidence.masked_fill(hot, 0.0))
    total = (wrong if fisher == "paper" else widen(rows.evidence)).sum(1, keepdim=True) + wrong.shape[1]
    information = wrong.square() * (torch.polygamma(1, wrong + 1) - torch.polygamma(1, total))
    return (0.5 * information.sum(1)).to(rows.evidence.dtype)


RISKS: dict[str, Callable[[EvidenceRows], Tensor]] = {
    "sse": sum_of_squares,
    "nll": negative_log_likelihood,
    "cross_entropy": cross_entropy,
}
