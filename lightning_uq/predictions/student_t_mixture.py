"""The prediction of a regressor with a Student-t likelihood."""

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import student_t
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import upcast_together, widen
from lightning_uq.functional.targets import sum_over_targets
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction


class StudentTMixturePrediction(NumberPrediction):
    """A regressor's prediction: an equal-weight mixture of one Student-t per hypothesis.

    Its tails are heavier than a Gaussian's, so a few outlying targets do not move the location. The D dimensions are independent
    given the hypothesis.

    Args:
        location: Locations [Z, B, D], or [Z, B, H, D] over a horizon; Z = 1 for one network.
        scale: Scales of the same shape, positive.
        degrees_of_freedom: Degrees of freedom of the same shape, above 2, so that the variance exists.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes differ or have fewer than three axes, or a value is out of range.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> prediction = StudentTMixturePrediction(0 * one, one, 4 * one)
        >>> prediction.variance, prediction.interval(0.5)[1]
        (tensor([[2.]]), tensor([[0.7407]], dtype=torch.float64))
    """

    location = Field("Locations [Z, B, D].", batch_axis=1, unit="location")
    scale = Field("Scales [Z, B, D].", batch_axis=1, unit="scale")
    degrees_of_freedom = Field("Degrees of freedom [Z, B, D], above 2.", batch_axis=1)

    def _check(self) -> None:
        self._check_shapes("[Z, B, D]", *(name for name, field in self._fields.items() if not field.optional))
        super()._check()

    def _check_values(self) -> None:
        if not bool(((self.scale > 0) & (self.degrees_of_freedom > 2)).all()):
            raise InputError(
                "`scale` must be positive and `degrees_of_freedom` above 2, but some of their values are not."
            )

    @property
    def num_indices(self) -> int:
        """Z, the number of hypotheses."""
        return len(self.location)

    @property
    def mean(self) -> Tensor:
        """E[y] = mean_z location_z [B, D]."""
        return self.location.mean(0)

    @property
    def aleatoric_variance(self) -> Tensor:
        """mean_z scale_z^2 df_z / (df_z - 2) [B, D]."""
        df = self.degrees_of_freedom
        return (self.scale.square() * (df / (df - 2))).mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over z of the locations [B, D]."""
        return (self.location - self.mean).square().mean(0)

    def log_prob(self, target: Tensor) -> Tensor:
        """log mean_z prod_d St(target_d; z) over the known targets: [B] in float64 for ``target`` [B, D]."""
        value, known = self._checked_known(target)
        members = sum_over_targets(student_t.student_t_log_prob(value, *self._student_t), known)
        return torch.logsumexp(members, 0) - math.log(len(members))

    def components(self) -> Components:
        """One Student-t per hypothesis [Z, B, D]."""
        df, location, scale = upcast_together(*self._student_t)
        return Components(location, scale, torch.full_like(location, -math.log(len(location))), df)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] in float64, under the marginals."""
        value, known = self._checked_known(target)
        return torch.where(known, student_t.student_t_cdf(value, *self._student_t).mean(0), torch.nan)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the marginals in float64, in the target's units; lower is better."""
        return student_t.student_t_mixture_crps(self._checked(target), *self._student_t)

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the marginals at a ``level`` in (0, 1), in float64."""
        check_open_unit("level", level)
        return self.quantiles_at(level)

    def quantiles_at(self, level: float | Tensor) -> Tensor:
        """Quantiles [B, D] at one level per target, in float64; ``level`` broadcasts to the targets."""
        return student_t.student_t_mixture_quantile(level, *self._student_t)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that contains probability ``level`` of each marginal."""
        if self.num_indices != 1:
            return super().interval(level)
        check_open_unit("level", level)
        upper = self.quantile((1 + level) / 2)
        return 2 * widen(self.mean) - upper, upper

    def _parameters(self) -> dict[str, Tensor]:
        """``degrees_of_freedom`` and ``scale`` of one hypothesis."""
        return (
            {"degrees_of_freedom": self.degrees_of_freedom[0], "scale": self.scale[0]} if self.num_indices == 1 else {}
        )

    @property
    def _student_t(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.degrees_of_freedom, self.location, self.scale
