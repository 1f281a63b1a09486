"""The base class of all numeric predictions."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.regression import counts_below_quantiles, in_central_interval
from lightning_uq.functional.targets import aligned_target, known_targets
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.base import DENSITY_FIELDS, Prediction
from lightning_uq.predictions.fields import Field


class NumberPrediction(Prediction):
    """The base class of predictions of targets [B, D], or [B, H, D] over a horizon: a mean, and a variance with two parts.

    A target may lack its last axis if D = 1. NaN marks missing values.

    Predictions of maps hold the D targets of each position as [B, D, *P]: ``map_shape`` is P, scores are maps [B, *P], and
    :meth:`as_rows` gives each position as a separate row.
    """

    grid = Field(
        "An empty tensor [0, *P] whose shape holds the positions of a map; absent if there is one target per input.",
        optional=True,
    )

    conformal_lower = Field(
        "Lower bounds [B, D] of intervals with a fitted coverage.", batch_axis=0, fitted_by="conformal interval"
    )
    conformal_upper = Field(
        "Upper bounds [B, D] of intervals with a fitted coverage.", batch_axis=0, fitted_by="conformal interval"
    )

    variance_scale = Field(
        "Factors [D] by which the variances were multiplied, or the variances that means without a variance were given.",
        fitted_by="variance scaling",
    )

    recalibration = Field(
        "Knots [2, D, K] of the map from predicted to calibrated probabilities.",
        fitted_by="quantile recalibration",
    )

    score_names: ClassVar[tuple[str, ...]] = ("variance", "aleatoric_variance", "epistemic_variance")

    @property
    def target_shape(self) -> torch.Size:
        """The shape [B, ..., D] of the predicted targets."""
        _, tensor, axis = self._present()[0]
        return tensor.shape[axis or 0 :]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the positions of each input, such as (H, W) of a depth map; empty if there is one target per input."""
        grid = self._get("grid")
        return () if grid is None else tuple(grid.shape[1:])

    def as_maps(self) -> Self:
        """Convert a prediction of targets [B, *P, D] to one of maps [B, D, *P].

        Example:
            >>> from lightning_uq.predictions import PointPrediction
            >>> prediction = PointPrediction(torch.zeros(1, 5, 8, 6, 2)).as_maps()
            >>> prediction.mean.shape, prediction.map_shape, prediction.as_rows().mean.shape
            (torch.Size([5, 2, 8, 6]), (8, 6), torch.Size([240, 2]))
        """
        shape = self.target_shape[1:-1]
        moved = {
            name: tensor if axis is None or tensor.ndim == axis + 1 else tensor.movedim(axis + 1 + len(shape), axis + 1)
            for name, tensor, axis in self._present()
        }
        moved["grid"] = self._present()[0][1].new_empty(0, *shape)
        return self._from_tensors({name: moved.get(name) for name in self._fields})

    def as_rows(self) -> Self:
        """The prediction with every position of a map as a separate row: [B, D, H, W] becomes [B H W, D].

        ``log_density`` [B] and ``ood_score`` are repeated for each position of their input.
        """
        if not self.map_shape:
            return self
        num, positions = len(self.map_shape), torch.Size(self.map_shape).numel()
        rows: dict[str, Tensor] = {}
        for name, tensor, axis in self._present():
            if axis is None:
                rows[name] = tensor
            elif tensor.ndim == axis + 1:
                rows[name] = tensor.repeat_interleave(positions, axis)
            elif name in DENSITY_FIELDS:
                rows[name] = tensor.flatten(axis)
            else:
                rows[name] = tensor.movedim(axis + 1, axis + 1 + num).flatten(axis, axis + num)
        return self._from_tensors({**{name: rows.get(name) for name in self._fields}, "grid": None})

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """E[y] [B, D]."""

    @property
    def point(self) -> Tensor:
        """The number per target [B, D] from which absolute errors are measured: the mean, or the median of quantiles."""
        return self.mean

    @property
    @abstractmethod
    def aleatoric_variance(self) -> Tensor:
        """Mean over the hypotheses of their predicted variance [B, D]."""

    @property
    @abstractmethod
    def epistemic_variance(self) -> Tensor:
        """Variance of the hypotheses' means [B, D]."""

    @property
    def variance(self) -> Tensor:
        """Var[y] [B, D]: the sum of the aleatoric and the epistemic variance."""
        return self.aleatoric_variance + self.epistemic_variance

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """Joint log-density [B] of the known numbers of a target [B, D]; NaN for a row without any."""

    @abstractmethod
    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the marginals at a ``level`` in (0, 1)."""

    @abstractmethod
    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the marginals."""

    @abstractmethod
    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the marginals, in the target's units; lower is better."""

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that contains probability ``level`` of each marginal."""
        check_open_unit("level", level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def covered(self, target: Tensor, level: float) -> Tensor:
        """Whether the target lies in the central interval of this level: bool [B, D]; False for a missing target.

        A value lies between two quantiles exactly if its probability integral lies between their levels, so quantiles need not be
        computed.
        """
        check_open_unit("level", level)
        return in_central_interval(self._integral(target), level)

    def counts_below(self, target: Tensor, levels: Sequence[float]) -> Tensor:
        """Number of known targets at or below the predicted quantile of each level: [L] in float64."""
        integral = self._integral(target)
        return counts_below_quantiles(integral, integral.new_tensor(levels), ~integral.isnan())

    def _integral(self, target: Tensor) -> Tensor:
        """P(Y <= target) in float64: close to 1, float32 has too few digits for a comparison with a level."""
        wide = widen(target)
        return widen(self.to(wide.dtype).cdf(wide))

    def components(self) -> Components:
        """The marginals as mixtures of Gaussian or Student-t distributions: M components of shape [M, B, ..., D].

        Raises:
            InputError: The prediction is not such a mixture.
        """
        raise InputError(f"A {type(self).__name__} has no `components`: it is not a mixture of distributions.")

    def scaled(self, factor: Tensor) -> "NumberPrediction":
        """The prediction with all variances multiplied by a factor.

        The distribution of each target is stretched about its :attr:`point` c: y becomes c + s (y - c), where s^2 is the factor. The
        point therefore stays, the aleatoric and the epistemic variance grow by the same factor, and an interval grows by s. Predictions
        of means without a variance become Gaussians with the factor as their variance.

        Args:
            factor: s^2 [D], positive. Predictions store it as ``variance_scale``.

        Raises:
            InputError: The prediction was scaled before, or the factor has another shape.
        """
        self._check_factor(factor)
        new: dict[str, Tensor | None] = {"variance_scale": factor}
        for name, tensor, axis in self._present():
            unit = self._fields[name].unit
            if unit is not None:
                assert axis is not None
                trailing = (1,) * (tensor.ndim - axis - len(self.target_shape))
                wide = upcast(tensor)
                square = factor.to(wide).reshape(-1, *(1 for _ in self.map_shape), *trailing)
                if unit == "variance":
                    wide = wide * square
                elif unit == "scale":
                    wide = wide * square.sqrt()
                else:
                    center = self.point.to(wide).reshape(*self.target_shape, *trailing)
                    wide = center + square.sqrt() * (wide - center)
                new[name] = wide.to(tensor.dtype)
        return self._from_tensors({**self.__dict__["_tensors"], **new})

    def _check_factor(self, factor: Tensor) -> None:
        if self._get("variance_scale") is not None:
            raise InputError(
                f"This {type(self).__name__} was already scaled. Scale the prediction that it was made from."
            )
        dims = self.target_shape[self.target_axis]
        if factor.shape != (dims,):
            raise InputError(
                f"`factor` must have shape [{dims}], one number per target, but its shape is {list(factor.shape)}."
            )

    def scaling_rows(self, target: Tensor) -> tuple[Tensor, ...]:
        """The data to fit the factor of :meth:`scaled` to, as arguments of a function of :mod:`~lightning_uq.functional.variance_scaling`.

        The function is ``fit_stretch`` for a distribution, ``fit_quantile_stretch`` for quantiles, and ``fit_residual_variance`` for
        means without a variance.

        Raises:
            InputError: No factor can be fitted to such a prediction.
        """
        point = self.point
        location, *rest = self.components()
        offset = location - point
        return (self._checked(target).to(point) - point, *(t.transpose(0, 1) for t in (offset, *rest) if t is not None))

    def recalibrated(self, knots: Tensor) -> "NumberPrediction":
        """The prediction whose distribution functions were transformed by one map per target.

        Args:
            knots: [2, D, K] from :func:`~lightning_uq.functional.quantile_recalibration.fit_recalibration`. Predictions store them
                as ``recalibration``.

        Raises:
            InputError: The prediction has no distribution function, or was already recalibrated.
        """
        from lightning_uq.predictions.recalibrated import RecalibratedPrediction

        return RecalibratedPrediction.of(self, knots)

    def _check_knots(self, knots: Tensor) -> None:
        dims = self.target_shape[self.target_axis]
        if knots.ndim != 3 or knots.shape[:2] != (2, dims) or knots.shape[2] < 2:
            raise InputError(
                f"The knots of a recalibration must have shape [2, {dims}, K], but their shape is {list(knots.shape)}."
            )

    def recalibration_rows(self, target: Tensor) -> Tensor:
        """Probability integrals P(Y <= target) [B, ..., D] in float64, to which the map of :meth:`recalibrated` is fitted.

        Raises:
            InputError: The prediction has none.
        """
        return self._integral(target)

    @property
    def target_axis(self) -> int:
        """The axis of the D targets: 1 for maps, otherwise the last."""
        return 1 if self.map_shape else len(self.target_shape) - 1

    def pool(self) -> "NumberPrediction":
        """The prediction without its members: the mean and the two variances, Z times smaller."""
        from lightning_uq.predictions.pooled_regression import PooledRegressionPrediction

        moments = self.mean, self.aleatoric_variance, self.epistemic_variance
        shared = {**self._fitted(), "grid": self._get("grid")}
        return PooledRegressionPrediction(*moments, **shared, **self._further_moments())

    def _further_moments(self) -> dict[str, Tensor]:
        """Moments that a type keeps when it is pooled, in addition to those of all types."""
        return {}

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, ``lower`` and ``upper`` of an interval, and ``log_density`` if fitted.

        Args:
            interval: Level in (0, 1) of the central interval from ``lower`` to ``upper``; None leaves it out.
        """
        bounds = {} if interval is None else dict(zip(("lower", "upper"), self.interval(interval), strict=True))
        results = {
            "mean": self.mean,
            "variance": self.variance,
            "aleatoric_variance": self.aleatoric_variance,
            "epistemic_variance": self.epistemic_variance,
            **self._parameters(),
            **bounds,
        }
        return self._columns(results)

    def _parameters(self) -> dict[str, Tensor]:
        """Additional results of the type, for :meth:`to_dict`."""
        return {}

    def _score(self, name: str) -> Tensor:
        score = super()._score(name)
        if self.map_shape:
            return score.mean(1)
        return score.flatten(1).mean(1) if score.ndim > 1 else score

    def _checked(self, target: Tensor) -> Tensor:
        if self.map_shape and self.target_shape[1] == 1 and target.ndim == len(self.target_shape) - 1:
            target = target.unsqueeze(1)
        return aligned_target(target, self.target_shape)

    def _checked_known(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The target with 0 for missing values, and the mask of known values."""
        return known_targets(self._checked(target))

    def _check_shapes(self, axes: str, *names: str) -> None:
        """Refuse tensors that do not share one shape with these axes; further axes may precede the last."""
        tensors = {name: self.__dict__["_tensors"][name] for name in names}
        shapes = [list(tensor.shape) for tensor in tensors.values()]
        ndim = len(axes.split())
        same = all(shape == shapes[0] for shape in shapes)
        if len(shapes[0]) >= ndim and same:
            return
        add = f" Add the index axis: `{names[0]}.unsqueeze(0)`." if same and ndim == 3 and len(shapes[0]) == 2 else ""
        raise InputError(
            f"{', '.join(f'`{name}`' for name in names)} must have one shape {axes}, but their shapes are "
            f"{', '.join(map(str, shapes))}.{add}"
        )
