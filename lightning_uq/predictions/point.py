"""The prediction of a regressor that predicts one number per target, without a variance."""

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.ensemble_crps import empirical_crps
from lightning_uq.functional.precision import upcast
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.gaussian_mixture import GaussianMixturePrediction
from lightning_uq.predictions.numbers import NumberPrediction
from lightning_uq.predictions.pooled_regression import PooledRegressionPrediction
from lightning_uq.predictions.spread import SpreadPrediction, variance_over


class PointPrediction(SpreadPrediction):
    """A regressor's prediction: one number per target and hypothesis.

    The spread of several hypotheses is their ``epistemic_variance``. It is not the variance of the target, whose noise is unknown, so
    ``variance``, ``interval``, ``cdf`` and ``log_prob`` raise errors with advice on alternatives.

    Args:
        member_mean: The hypotheses' means [Z, B, D], or [Z, B, H, D] over a horizon; Z = 1 for one network.
        members_variance: For pooled hypotheses: their variance [B, D]; ``member_mean`` [1, B, D] is then their mean.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shape has fewer than three axes.

    Example:
        >>> import torch
        >>> prediction = PointPrediction(torch.tensor([[[0.0]], [[2.0]]]))
        >>> prediction.mean, prediction.epistemic_variance
        (tensor([[1.]]), tensor([[1.]]))
    """

    member_mean = Field("The hypotheses' means [Z, B, D].", batch_axis=1, unit="location")

    def _check(self) -> None:
        self._check_shapes("[Z, B, D]", "member_mean")
        super()._check()

    @property
    def _members(self) -> Tensor:
        return self.member_mean

    @property
    def mean(self) -> Tensor:
        """Mean of the hypotheses [B, D]."""
        return upcast(self.member_mean).mean(0)

    def _spread(self) -> Tensor:
        return variance_over(upcast(self.member_mean))

    def with_variance(self, variance: Tensor, epistemic: Tensor) -> GaussianMixturePrediction:
        """One Gaussian per hypothesis, with the same means.

        Args:
            variance: Variances of the targets [Z, B, D].
            epistemic: The part of the variances that is not noise [Z, B, D].
        """
        shared = {**self._fitted(), "grid": self._get("grid")}
        return GaussianMixturePrediction(self.member_mean, variance, member_epistemic_variance=epistemic, **shared)

    def crps(self, target: Tensor) -> Tensor:
        """CRPS [B, D] of the distribution that gives each hypothesis the same probability, in the target's units.

        It is a proper score of the hypotheses' distribution, and the absolute error of a single hypothesis. That distribution does not
        include the noise of the targets, so a head with a variance usually has a lower CRPS.
        """
        if self.is_pooled:
            raise InputError(
                "`crps` needs the members, which were pooled when this prediction was made. Set `module.return_members = True` to "
                "keep them."
            )
        return empirical_crps(self.member_mean, self._checked(target))

    def scaled(self, factor: Tensor) -> NumberPrediction:
        """One Gaussian per hypothesis with this variance [D]; for pooled hypotheses, the moments of their mixture."""
        self._check_factor(factor)
        shared = {**self._fitted(), "grid": self._get("grid"), "variance_scale": factor}
        mean = upcast(self.member_mean)
        variance = factor.to(mean).reshape(-1, *(1 for _ in self.map_shape)).expand(mean.shape)
        if self.is_pooled:
            return PooledRegressionPrediction(mean[0], variance[0], upcast(self.members_variance), **shared)
        return GaussianMixturePrediction.of_checked(member_mean=mean, member_variance=variance, **shared)

    def scaling_rows(self, target: Tensor) -> tuple[Tensor, ...]:
        """The errors of the hypotheses [B, Z, ..., D]."""
        if self.is_pooled:
            raise InputError(
                "A variance is fitted to the members, which were pooled when this prediction was made. Set `module.return_members = True` to "
                "keep them."
            )
        mean = upcast(self.member_mean)
        return ((self._checked(target).to(mean) - mean).transpose(0, 1),)

    def recalibration_rows(self, target: Tensor) -> Tensor:
        """Raise an error: means have no distribution."""
        raise InputError(
            f"A recalibration needs distributions, but a {type(self).__name__} holds only means. Put VarianceScaling before it, or use a "
            "head with a variance, for instance `Regression(head='mean_variance')`."
        )

    def quantile(self, level: float) -> Tensor:
        """Raise an error: the noise of the targets is unknown."""
        self._refuse("quantile")

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Raise an error: the noise of the targets is unknown."""
        self._refuse("interval")

    def cdf(self, target: Tensor) -> Tensor:
        """Raise an error: the noise of the targets is unknown."""
        self._refuse("cdf")

    def pool(self) -> "PointPrediction":
        """The prediction in which the mean and the variance replace the members."""
        pooled = self._pooled(member_mean=self.mean.unsqueeze(0))
        assert isinstance(pooled, PointPrediction)
        return pooled

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``mean``, ``epistemic_variance`` of several hypotheses, and ``log_density`` if fitted. A mean has no interval."""
        return self._columns({"mean": self.mean, **self._member_spread()})
