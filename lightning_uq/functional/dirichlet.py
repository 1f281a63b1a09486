"""Closed forms of a Dirichlet over class probabilities, in float64.

Entropies and vacuity take concentrations alpha [B, C, ...] > 0 with the class axis at 1; S = sum_c alpha_c. In float32, the mutual
information, a difference of digammas, is already 1% off at an evidence of 2e4.

Source: Malinin & Gales, NeurIPS 2018 (arXiv 1802.10501), appendix C.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen

_SERIES_FROM = 64.0
_MAX_FACTORS = 64
"""Up to this power, a rising factorial is a product. Above it, the cancellation in a difference of log-gammas is small."""


def dirichlet_predictive_entropy(concentration: Tensor, normalize: bool = False) -> Tensor:
    """H[E[p]] for p ~ Dir(alpha), in nats: the entropy of alpha / S.

    Args:
        concentration: alpha [B, C, ...].
        normalize: Whether to divide by log C, so that it lies in [0, 1].

    Returns:
        [B, ...] in float64.

    Example:
        >>> dirichlet_predictive_entropy(torch.tensor([[1.0, 1.0]]), normalize=True)
        tensor([1.], dtype=torch.float64)
    """
    alpha = widen(concentration)
    return _scaled(torch.special.entr(alpha / alpha.sum(1, keepdim=True)).sum(1), alpha, normalize)


def dirichlet_expected_entropy(concentration: Tensor, normalize: bool = False) -> Tensor:
    """E[H[p]] for p ~ Dir(alpha), in nats: sum_c alpha_c / S (psi(S + 1) - psi(alpha_c + 1)).

    Args:
        concentration: alpha [B, C, ...].
        normalize: Whether to divide by log C, so that it lies in [0, 1].

    Returns:
        [B, ...] in float64.

    Example:
        >>> dirichlet_expected_entropy(torch.tensor([[1.0, 1.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    alpha = widen(concentration)
    total = alpha.sum(1, keepdim=True)
    value = (alpha / total * (torch.digamma(total + 1) - torch.digamma(alpha + 1))).sum(1)
    return _scaled(value, alpha, normalize)


def dirichlet_mutual_information(concentration: Tensor, normalize: bool = False) -> Tensor:
    """H[E[p]] - E[H[p]] for p ~ Dir(alpha), in nats.

    It is computed as sum_c alpha_c / S (g(alpha_c) - g(S)) with the decreasing g(a) = psi(a + 1) - log a, which is about 1 / (2 a). A
    difference of the entropies would have no digits left at an evidence of 1e15.

    Args:
        concentration: alpha [B, C, ...].
        normalize: Whether to divide by log C, so that it lies in [0, 1].

    Returns:
        [B, ...] in float64.

    Example:
        >>> dirichlet_mutual_information(torch.tensor([[1.0, 1.0]]))
        tensor([0.1931], dtype=torch.float64)
    """
    alpha = widen(concentration)
    total = alpha.sum(1, keepdim=True)
    information = (alpha / total * (_digamma_gap(alpha) - _digamma_gap(total))).sum(1)
    return _scaled(information, alpha, normalize)


def _digamma_gap(a: Tensor) -> Tensor:
    """psi(a + 1) - log a. For large a, where the two parts cancel, it is a series in 1 / a."""
    inverse = 1 / a.clamp_min(_SERIES_FROM)
    square = inverse.square()
    series = inverse * (1 / 2 - inverse * (1 / 12 - square * (1 / 120 - square / 252)))
    return torch.where(a < _SERIES_FROM, torch.digamma(a + 1) - a.log(), series)


def dirichlet_differential_entropy(concentration: Tensor) -> Tensor:
    """Differential entropy of Dir(alpha) in nats; at most 0 for C = 2, and lower for sharper densities.

    log B(alpha) + (S - C) psi(S) - sum_c (alpha_c - 1) psi(alpha_c).

    Example:
        >>> dirichlet_differential_entropy(torch.tensor([[1.0, 1.0]])).abs() < 1e-12
        tensor([True])
    """
    alpha = widen(concentration)
    total = alpha.sum(1)
    log_beta = torch.lgamma(alpha).sum(1) - torch.lgamma(total)
    return log_beta + (total - alpha.shape[1]) * torch.digamma(total) - ((alpha - 1) * torch.digamma(alpha)).sum(1)


def kl_to_uniform(evidence: Tensor) -> Tensor:
    """KL(Dir(1 + evidence) || Dir(1)) in nats: [B, ...] for evidence [B, C, ...] >= 0.

    With alpha = 1 + evidence: log Gamma(S) - sum_c log Gamma(alpha_c) - log Gamma(C) + sum_c (alpha_c - 1) (psi(alpha_c) -
    psi(S)). The argument is the evidence, because 1 + evidence would lose a small one. It computes in float64 and returns the
    evidence's dtype. The gradient is the closed form (alpha_c - 1) psi'(alpha_c) - (S - C) psi'(S), and can be differentiated.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), section 4.

    Example:
        >>> kl_to_uniform(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([0.0000, 0.1931])
    """
    divergence: Tensor = _KLToUniform.apply(evidence)
    return divergence


class _KLToUniform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evidence: Tensor) -> Tensor:
        ctx.save_for_backward(evidence)
        excess = widen(evidence)
        alpha = excess + 1
        total = alpha.sum(1)
        value = torch.lgamma(total) - torch.lgamma(alpha).sum(1) - math.lgamma(alpha.shape[1])
        value = value + (excess * torch.digamma(alpha)).sum(1) - excess.sum(1) * torch.digamma(total)
        return value.clamp_min(0).to(evidence.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Tensor:
        (evidence,) = ctx.saved_tensors
        excess = widen(evidence)
        total = excess.sum(1, keepdim=True)
        slope = excess * torch.polygamma(1, excess + 1) - total * torch.polygamma(1, total + excess.shape[1])
        gradient: Tensor = grad[0].unsqueeze(1) * slope.to(evidence.dtype)
        return gradient


def expected_squared_error(evidence: Tensor, hot: Tensor) -> Tensor:
    """E ||y - p||^2 under Dir(1 + evidence), [B, ...], for a one-hot y given as a mask ``hot`` of the evidence's shape.

    Let r be the sum of the wrong classes' alpha, g = r / S = 1 - p_y, and E = g^2 + sum_{j != y} p_j^2. The value is E + (2 g - E) / (S +
    1), which loses no digits if p_y is close to 1. Its gradient has a closed form, and can be differentiated.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 5.

    Example:
        >>> expected_squared_error(torch.zeros(1, 2), torch.tensor([[True, False]]))
        tensor([0.6667])
    """
    value: Tensor = _ExpectedSquaredError.apply(evidence, hot)
    return value


class _ExpectedSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evidence: Tensor, hot: Tensor) -> Tensor:
        ctx.save_for_backward(evidence, hot)
        _, total, gap, error = _errors(evidence, hot)
        return (error + (2 * gap - error) / (total + 1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None]:
        evidence, hot = ctx.saved_tensors
        wrong, total, gap, error = _errors(evidence, hot)
        # The derivative with respect to every alpha, and the additional part for wrong classes.
        common = (error - 2 * gap) / (total + 1) - 2 * (error + gap / total)
        beyond = (2 * (wrong + (gap + 1 / total))).masked_fill(hot, 0.0)
        return (beyond + common) * (grad[0].unsqueeze(1) / (total + 1)), None


def _errors(evidence: Tensor, hot: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean probabilities of the wrong classes [B, C, ...], and S, g and E [B, 1, ...]."""
    alpha = evidence + 1
    wrong = alpha.masked_fill(hot, 0.0)
    total = alpha.sum(1, keepdim=True)
    wrong = wrong / total
    gap = wrong.sum(1, keepdim=True)
    return wrong, total, gap, gap.square() + wrong.square().sum(1, keepdim=True)


def dirichlet_log_det_fisher(concentration: Tensor) -> Tensor:
    """log det of the Fisher information of Dir(alpha), [B, ...] in float64.

    The matrix is diag(psi'(alpha)) - psi'(S) 1 1^T, so its determinant is prod_c psi'(alpha_c) (1 - psi'(S) sum_c 1 /
    psi'(alpha_c)). The bracket is psi'(S) (sum_c r(alpha_c) - r(S)) with r(a) = a - 1 / psi'(a), which tends to 1/2.

    Source: Deng et al., ICML 2023 (arXiv 2303.02045), section 3.

    Example:
        >>> dirichlet_log_det_fisher(torch.tensor([[1.0, 1.0]]))
        tensor([-0.5378], dtype=torch.float64)
    """
    alpha = widen(concentration)
    total = alpha.sum(1)
    each, whole = torch.polygamma(1, alpha), torch.polygamma(1, total)
    remainder = (alpha - 1 / each).sum(1) - (total - 1 / whole)
    return each.log().sum(1) + whole.log() + remainder.log()


def log_rising_factorial_ratio(numerator: Tensor, denominator: Tensor, power: float) -> Tensor:
    """log [Gamma(a + p) / Gamma(a)] - log [Gamma(b + p) / Gamma(b)], elementwise, for a, b > 0.

    Its exponential is E[x^p] for x ~ Beta(a, b - a). For an integer p it is sum_{k < p} log((a + k) / (b + k)), which keeps all
    digits in float32. For more than 64 factors, and for other p, it is a difference of log-gammas in float64.

    Example:
        >>> log_rising_factorial_ratio(torch.tensor(1.0), torch.tensor(2.0), 2).exp()  # E[x^2] of a uniform x
        tensor(0.3333)
    """
    if power == int(power) and power <= _MAX_FACTORS:
        result = torch.log(numerator / denominator)
        for k in range(1, int(power)):
            result = result + torch.log((numerator + k) / (denominator + k))
        return result
    a, b = widen(numerator), widen(denominator)
    wide = torch.lgamma(a + power) - torch.lgamma(a) - (torch.lgamma(b + power) - torch.lgamma(b))
    return wide.to(numerator.dtype)


def _scaled(value: Tensor, alpha: Tensor, normalize: bool) -> Tensor:
    return value / math.log(alpha.shape[1]) if normalize else value
