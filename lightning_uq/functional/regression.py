"""Scores of equal-weight Gaussian mixtures [Z, B, D] against a target [B, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration import Norm
from lightning_uq.functional.mixture import gaussian_log_prob, mixture_cdf, mixture_moments
from lightning_uq.functional.precision import widen
from lightning_uq.functional.targets import aligned_target
from lightning_uq.functional.validation import check_choice, check_floating


def check_mixture(mean: Tensor, variance: Tensor, target: Tensor, *, validate: bool = True) -> None:
    """Refuse a mixture or a target with other shapes or with infinity, and a variance that is not positive.

    Raises:
        InputError: One of these; the message names the argument.
    """
    check_floating("mean", mean, 3, "[Z, B, D] (for a single network, pass mean[None])")
    check_floating("variance", variance, 3, "[Z, B, D]")
    check_floating("target", target, 1, "[B, D]")
    if mean.ndim < 3 or mean.shape != variance.shape or len(mean) == 0:
        raise InputError(
            f"`mean` and `variance` must have one shape [Z, B, D] with Z > 0, but their shapes are "
            f"{list(mean.shape)} and {list(variance.shape)}."
        )
    target = aligned_target(target, mean.shape[1:])
    if not validate:
        return
    if not bool(mean.isfinite().all()):
        raise InputError("`mean` must be finite, but it holds NaN or infinity.")
    if bool(target.isinf().any()):
        raise InputError("`target` must be finite, or NaN if it is missing, but it holds infinity.")
    if not bool(((variance > 0) & variance.isfinite()).all()):
        raise InputError("`variance` must be positive and finite, but it holds other values.")


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor, moment_matched: bool = False) -> Tensor:
    """Negative log-density of the target in nats, including the constant log(2 pi) / 2.

    - the mixture: -log mean_z prod_d N(y_d; mu_zd, sigma_zd^2); dimensions are independent given z, but not under the mixture
    - ``moment_matched``: -sum_d log N(y_d; mu*_d, sigma*_d^2), with the mixture's mean and variance: the single Gaussian
      in the table of the deep-ensembles paper

    Args:
        mean: Component means [Z, B, D].
        variance: Component variances [Z, B, D].
        target: [B, D].
        moment_matched: Whether to use the single Gaussian instead of the mixture.

    Returns:
        [B]; lower is better.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).

    Example:
        >>> gaussian_nll(torch.zeros(2, 1, 1), torch.ones(2, 1, 1), torch.zeros(1, 1))
        tensor([0.9189])
    """
    if moment_matched:
        return -gaussian_log_prob(*mixture_moments(mean, variance), target).sum(-1)
    return math.log(len(mean)) - torch.logsumexp(gaussian_log_prob(mean, variance, target).sum(-1), 0)


def interval_covered(mean: Tensor, variance: Tensor, target: Tensor, level: float) -> Tensor:
    """Whether the target lies in the mixture's central interval of this level, elementwise.

    A value lies between two quantiles exactly if its probability integral lies between their levels, so quantiles need not be
    computed.

    Args:
        mean: Component means [Z, B, D].
        variance: Component variances [Z, B, D].
        target: [B, D].
        level: Nominal coverage of the interval, in (0, 1).

    Returns:
        [B, D] of bool.

    Example:
        >>> interval_covered(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[1.9], [2.0]]), 0.95)
        tensor([[ True],
                [False]])
    """
    return in_central_interval(mixture_cdf(*_wide(mean, variance, target)), level)


def in_central_interval(integral: Tensor, level: float) -> Tensor:
    """Whether a probability integral P(Y <= y) lies between the levels of a central interval, elementwise.

    Example:
        >>> in_central_interval(torch.tensor([0.01, 0.5]), 0.95)
        tensor([False,  True])
    """
    return ((1 - level) / 2 <= integral) & (integral <= (1 + level) / 2)


def quantile_counts(mean: Tensor, variance: Tensor, target: Tensor, num_levels: int) -> Tensor:
    """Number of targets at or below the predicted quantile of each level k / (num_levels + 1), k = 1 ... num_levels.

    Args:
        mean: Component means [Z, B, D].
        variance: Component variances [Z, B, D].
        target: [B, D].
        num_levels: Number of levels.

    Returns:
        [num_levels] in float64.

    Example:
        >>> quantile_counts(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[-9.0], [0.1]]), 3)
        tensor([1., 1., 2.], dtype=torch.float64)
    """
    return counts_below_quantiles(mixture_cdf(*_wide(mean, variance, target)), quantile_levels(num_levels))


def counts_below_quantiles(integral: Tensor, levels: Tensor, known: Tensor | None = None) -> Tensor:
    """:func:`quantile_counts` for any increasing levels, from the targets' probability integrals P(Y <= y) of any shape.

    Args:
        integral: Probability integrals.
        levels: [L], in increasing order.
        known: A mask of the integrals that count; None for all.

    Returns:
        [L] in float64.

    Example:
        >>> counts_below_quantiles(torch.tensor([0.1, 0.6]), torch.tensor([0.25, 0.5, 0.75]))
        tensor([1., 1., 2.], dtype=torch.float64)
    """
    integral, levels = integral.reshape(-1), levels.to(integral)
    first = torch.searchsorted(levels, integral)  # the lowest level at or above the integral
    if known is not None:
        first = torch.where(known.reshape(-1), first, len(levels))
    return widen(torch.bincount(first, minlength=len(levels) + 1)[: len(levels)].cumsum(0))


def quantile_levels(num_levels: int) -> Tensor:
    """The levels k / (num_levels + 1) in float64."""
    return torch.arange(1, num_levels + 1, dtype=torch.float64) / (num_levels + 1)


def quantile_calibration_error(
    counts: Tensor, total: Tensor, norm: Norm = "l1", levels: Tensor | None = None
) -> Tensor:
    """Distance between the levels of predicted quantiles and the shares of targets below them.

    Args:
        counts: The result of :func:`quantile_counts`, or a sum of such results: [num_levels].
        total: Number of targets.
        norm: "l1" for the mean absolute, "l2" for the root mean squared, "max" for the largest difference.
        levels: The levels [L]; default: k / (L + 1).

    Returns:
        A scalar in [0, 1]; NaN without targets.

    Source: Kuleshov et al., ICML 2018 (arXiv 1807.00263).

    Example:
        >>> quantile_calibration_error(torch.tensor([0.0, 2.0, 2.0]).double(), torch.tensor(4.0))
        tensor(0.1667, dtype=torch.float64)
    """
    check_choice("norm", norm, ("l1", "l2", "max"))
    levels = quantile_levels(len(counts)) if levels is None else levels
    gap = (counts / total - levels.to(counts)).abs()
    if norm == "max":
        return gap.amax()
    return gap.mean() if norm == "l1" else gap.square().mean().sqrt()


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Convert to float64: in float32, a probability integral close to 1 has too few digits for a comparison with a level."""
    return [widen(tensor) for tensor in tensors]
