"""The prediction of a regressor with means and variances."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import mixture
from lightning_uq.predictions.base import Prediction


class GaussianMixturePrediction(Prediction):
    """A regressor's prediction: an equal-weight mixture of one Gaussian per hypothesis.

    Args:
        mean: Component means [Z, B, D], kept as ``member_mean``.
        variance: Component variances [Z, B, D], positive, kept as ``member_variance``.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: The shapes differ or have not three axes.

    Example:
        >>> prediction = GaussianMixturePrediction(torch.tensor([[[0.0]], [[2.0]]]), torch.ones(2, 1, 1))
        >>> prediction.mean, prediction.variance, prediction.epistemic_variance
        (tensor([[1.]]), tensor([[2.]]), tensor([[1.]]))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {"member_mean": 1, "member_variance": 1, "log_density": 0}

    def __init__(self, mean: Tensor, variance: Tensor, log_density: Tensor | None = None) -> None:
        self._set(member_mean=mean, member_variance=variance, log_density=log_density)
        if mean.ndim != 3 or mean.shape != variance.shape:
            raise InputError(
                f"Expected arguments `mean` and `variance` to be of one shape [Z, B, D], but got {list(mean.shape)} and "
                f"{list(variance.shape)}."
            )

    @property
    def member_mean(self) -> Tensor:
        """Component means [Z, B, D]."""
        return self._get("member_mean")

    @property
    def member_variance(self) -> Tensor:
        """Component variances [Z, B, D]."""
        return self._get("member_variance")

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture [B, D]."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[0]

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture [B, D]: the sum of the next two."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[1]

    @property
    def aleatoric_variance(self) -> Tensor:
        """mean_z sigma_z^2 [B, D]."""
        return mixture.mixture_moments(torch.zeros_like(self.member_mean), self.member_variance)[1]

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over z of the means [B, D]."""
        return mixture.mixture_moments(self.member_mean, torch.zeros_like(self.member_variance))[1]

    def log_prob(self, target: Tensor) -> Tensor:
        """log mean_z prod_d N(target_d; mu_zd, sigma_zd^2): [B] for ``target`` [B, D].

        The dimensions are independent given the index, not under the mixture.
        """
        self._check(target)
        members = mixture.gaussian_log_prob(self.member_mean, self.member_variance, target).sum(-1)
        return torch.logsumexp(members, 0) - math.log(len(members))

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the mixture's marginals at a ``level`` in (0, 1)."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return mixture.mixture_quantile(self.member_mean, self.member_variance, level)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the mixture's marginals."""
        self._check(target)
        return mixture.mixture_cdf(self.member_mean, self.member_variance, target)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the mixture's marginals, in the target's units."""
        self._check(target)
        return mixture.mixture_crps(self.member_mean, self.member_variance, target)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that holds a share ``level`` of the mixture."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def to_dict(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, and ``log_density`` where there is one."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "aleatoric_variance": self.aleatoric_variance,
            "epistemic_variance": self.epistemic_variance,
            **self._optional(),
        }

    def _check(self, target: Tensor) -> None:
        expected = self.member_mean.shape[1:]
        if target.shape != expected:
            raise InputError(
                f"Expected argument `target` to be of shape {list(expected)}, but got {list(target.shape)}; an array of "
                "another shape would broadcast."
            )
