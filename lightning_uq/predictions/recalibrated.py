"""Numeric predictions whose distribution functions were transformed by a calibrated map."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import widen
from lightning_uq.functional.quantile_recalibration import recalibrate, tail_integrals, uncalibrated_levels
from lightning_uq.functional.targets import known_targets, sum_over_targets
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.gaussian_mixture import GaussianMixturePrediction
from lightning_uq.predictions.mixture_density import MixtureDensityPrediction
from lightning_uq.predictions.numbers import NumberPrediction
from lightning_uq.predictions.student_t import StudentTPrediction
from lightning_uq.predictions.student_t_mixture import StudentTMixturePrediction

_Base = GaussianMixturePrediction | MixtureDensityPrediction | StudentTMixturePrediction


class RecalibratedPrediction(NumberPrediction):
    """The base class of predictions whose marginals F_d were transformed by maps R_d: P(Y_d <= y) = R_d(F_d(y)).

    It holds the tensors of the :attr:`raw` prediction, and the knots of the maps. R is piecewise linear, so the density is the raw
    density times a slope that is constant between two knots. Beyond the outermost knots the tails keep their shape. Means, variances
    and CRPS are numeric integrals with a relative error of about 1e-3, or 1e-2 if most of the variance lies in a tail. Each part of
    the variance keeps its share.

    In the raw prediction of several hypotheses, the targets are dependent. Here they are independent: ``log_prob`` is the sum of the
    marginals' log-densities.

    Raises:
        InputError: The knots do not fit the targets.
    """

    @classmethod
    @abstractmethod
    def kind(cls) -> type[_Base]:
        """The type of the raw prediction."""

    @staticmethod
    def of(prediction: NumberPrediction, knots: Tensor) -> "RecalibratedPrediction":
        """The recalibrated prediction; see :meth:`NumberPrediction.recalibrated`."""
        for cls in RecalibratedPrediction.__subclasses__():
            if cls.kind() is type(prediction):
                found = cls._from_tensors({**prediction.__getstate__(), "recalibration": knots})
                found._check()
                return found
        if isinstance(prediction, RecalibratedPrediction):
            raise InputError("This prediction was already recalibrated. Recalibrate its `raw`.")
        raise InputError(f"A {type(prediction).__name__} has no distribution functions, so it cannot be recalibrated.")

    @property
    def raw(self) -> _Base:
        """The prediction before the recalibration."""
        return self.kind()._from_tensors({**self.__getstate__(), "recalibration": None})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy on another device or in another dtype. The knots keep their dtype, since half precision would merge them."""
        moved = super().to(*args, **kwargs)
        return self._from_tensors(
            {**moved.__getstate__(), "recalibration": self.recalibration.to(moved.recalibration.device)}
        )

    def _check(self) -> None:
        super()._check()
        self._check_knots(self.recalibration)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the calibrated marginals."""
        return recalibrate(self.raw.cdf(target), self.recalibration, self.target_axis)[0]

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the calibrated marginals at a ``level`` in (0, 1)."""
        check_open_unit("level", level)
        levels = uncalibrated_levels(level, self.recalibration)
        return self.raw.quantiles_at(levels.reshape(-1, *[1] * len(self.map_shape)))

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that contains probability ``level`` of each marginal."""
        return NumberPrediction.interval(self, level)

    def log_prob(self, target: Tensor) -> Tensor:
        """Sum over the known targets of their calibrated log-densities: [B] in float64 for ``target`` [B, D]."""
        value, known = known_targets(self._checked(target))
        raw = self.raw.components().log_density(value)
        slope = recalibrate(self.raw._integral(value), self.recalibration, self.target_axis)[1]
        return sum_over_targets((raw + slope.log()).unsqueeze(0), known).squeeze(0)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the calibrated marginals, in the target's units; lower is better."""
        value, known = known_targets(self._checked(target))
        return torch.where(known, self._integrals(value)[2], torch.nan).to(self.raw.mean.dtype)

    @property
    def mean(self) -> Tensor:
        """E[y] [B, D] under the calibrated marginals."""
        return self._moment(0)

    @property
    def variance(self) -> Tensor:
        """Var[y] [B, D] under the calibrated marginals."""
        return self._moment(1)

    @property
    def aleatoric_variance(self) -> Tensor:
        """The calibrated variance times the aleatoric share of the raw variance [B, D]."""
        return self.variance * (self.raw.aleatoric_variance / self.raw.variance)

    @property
    def epistemic_variance(self) -> Tensor:
        """The calibrated variance times the epistemic share of the raw variance [B, D]."""
        return self.variance * (self.raw.epistemic_variance / self.raw.variance)

    def components(self) -> Components:
        """Raise an error: a calibrated distribution is no longer a mixture."""
        raise InputError(
            f"A {type(self).__name__} has no `components`. Those before the recalibration are `raw.components()`."
        )

    def scaled(self, factor: Tensor) -> NumberPrediction:
        """Raise an error: scaling must precede the recalibration."""
        raise InputError(
            "A recalibrated prediction cannot be scaled. Put VarianceScaling before QuantileRecalibration."
        )

    def scaling_rows(self, target: Tensor) -> tuple[Tensor, ...]:
        """Raise an error: scaling must precede the recalibration."""
        self.scaled(target)
        raise AssertionError

    def _moment(self, which: int) -> Tensor:
        """The mean or the variance, computed together and cached."""

        def moments() -> Tensor:
            raw = self.raw
            center = widen(raw.mean)
            first, second, _ = self._integrals(center)
            # The integral leaves out the tails: they are the raw ones, times the slopes at both ends.
            wide = raw.to(center.dtype)
            left_out = wide.variance - tail_integrals(wide.cdf, wide.components(), center)[1]
            ends = torch.stack([torch.zeros_like(center), torch.ones_like(center)])
            slope = recalibrate(ends, self.recalibration, self.target_axis + 1)[1].mean(0)
            variance = second - first.square() + slope * left_out
            return torch.stack([center + first, variance]).to(raw.mean.dtype)

        return self._once("moments", moments)[which]

    def _integrals(self, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[Y - c], E[(Y - c)^2] and the CRPS at c, each [B, D]."""
        wide = self.to(widen(center).dtype)
        return tail_integrals(wide.cdf, wide.raw.components(), center)


class RecalibratedGaussianMixturePrediction(RecalibratedPrediction, GaussianMixturePrediction):
    """A recalibrated :class:`GaussianMixturePrediction`."""

    @classmethod
    def kind(cls) -> type[GaussianMixturePrediction]:
        """The type of the raw prediction."""
        return GaussianMixturePrediction


class RecalibratedMixtureDensityPrediction(RecalibratedPrediction, MixtureDensityPrediction):
    """A recalibrated :class:`MixtureDensityPrediction`."""

    @classmethod
    def kind(cls) -> type[MixtureDensityPrediction]:
        """The type of the raw prediction."""
        return MixtureDensityPrediction


class RecalibratedStudentTMixturePrediction(RecalibratedPrediction, StudentTMixturePrediction):
    """A recalibrated :class:`StudentTMixturePrediction`."""

    @classmethod
    def kind(cls) -> type[StudentTMixturePrediction]:
        """The type of the raw prediction."""
        return StudentTMixturePrediction


class RecalibratedStudentTPrediction(RecalibratedPrediction, StudentTPrediction):
    """A recalibrated :class:`StudentTPrediction`."""

    @classmethod
    def kind(cls) -> type[StudentTPrediction]:
        """The type of the raw prediction."""
        return StudentTPrediction
