"""The prediction of a regressor with means and variances."""

import math

import torch
from torch import Tensor

from lightning_uq.functional import mixture
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import upcast_together
from lightning_uq.functional.targets import sum_over_targets
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction


class GaussianMixturePrediction(NumberPrediction):
    """A regressor's prediction: an equal-weight mixture of one Gaussian per hypothesis.

    Args:
        member_mean: Component means [Z, B, D], or [Z, B, H, D] over a horizon.
        member_variance: Component variances of the same shape, positive.
        member_epistemic_variance: The part of ``member_variance`` that is not noise but the uncertainty of the component's own weights, of
            the same shape. :class:`FitLaplace` fits it.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes differ or have fewer than three axes.

    Example:
        >>> prediction = GaussianMixturePrediction(torch.tensor([[[0.0]], [[2.0]]]), torch.ones(2, 1, 1))
        >>> prediction.mean, prediction.variance, prediction.epistemic_variance
        (tensor([[1.]]), tensor([[2.]]), tensor([[1.]]))
    """

    member_mean = Field("Component means [Z, B, D].", batch_axis=1, unit="location")
    member_variance = Field("Component variances [Z, B, D].", batch_axis=1, unit="variance")
    member_epistemic_variance = Field(
        "The part of the component variances [Z, B, D] that is not noise.", batch_axis=1, optional=True, unit="variance"
    )

    def _check(self) -> None:
        has_parts = self._get("member_epistemic_variance") is not None
        parts = ("member_epistemic_variance",) if has_parts else ()
        self._check_shapes("[Z, B, D]", "member_mean", "member_variance", *parts)
        super()._check()

    @property
    def num_indices(self) -> int:
        """Z, the number of components."""
        return len(self.member_mean)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture [B, D]."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[0]

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture [B, D]: the sum of the aleatoric and the epistemic variance."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[1]

    @property
    def aleatoric_variance(self) -> Tensor:
        """mean_z sigma_z^2 [B, D], minus the mean of ``member_epistemic_variance`` if present."""
        own = self._get("member_epistemic_variance")
        noise = self.member_variance if own is None else self.member_variance - own
        return mixture.mixture_moments(torch.zeros_like(self.member_mean), noise)[1]

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over z of the means [B, D], plus the mean of ``member_epistemic_variance`` if present."""
        own = self._get("member_epistemic_variance")
        own = torch.zeros_like(self.member_variance) if own is None else own
        return mixture.mixture_moments(self.member_mean, own)[1]

    def log_prob(self, target: Tensor) -> Tensor:
        """log mean_z prod_d N(target_d; mu_zd, sigma_zd^2) over the known targets: [B] for ``target`` [B, D].

        The dimensions are independent given the index, but not under the mixture.
        """
        target, known = self._checked_known(target)
        log_prob = mixture.gaussian_log_prob(self.member_mean, self.member_variance, target)
        members = sum_over_targets(log_prob, known)
        return torch.logsumexp(members, 0) - math.log(len(members))

    def components(self) -> Components:
        """One Gaussian per hypothesis [Z, B, D]."""
        mean, variance = upcast_together(self.member_mean, self.member_variance)
        return Components(mean, variance.sqrt(), torch.full_like(mean, -math.log(len(mean))))

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the mixture's marginals at a ``level`` in (0, 1)."""
        check_open_unit("level", level)
        return self.quantiles_at(level)

    def quantiles_at(self, level: float | Tensor) -> Tensor:
        """Quantiles [B, D] at one level per target; ``level`` broadcasts to the targets."""
        return mixture.mixture_quantile(self.member_mean, self.member_variance, level)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the mixture's marginals."""
        return mixture.mixture_cdf(self.member_mean, self.member_variance, self._checked(target))

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the mixture's marginals, in the target's units."""
        return mixture.mixture_crps(self.member_mean, self.member_variance, self._checked(target))
