"""The prediction of a regressor that predicts quantiles of each target."""

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.quantile_recalibration import extended_cdf, extended_quantile, uncalibrated_levels
from lightning_uq.functional.quantiles import check_levels, pinball, quantile_at
from lightning_uq.functional.running_maximum import running_maximum
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.spread import SpreadPrediction, variance_over


class QuantilePrediction(SpreadPrediction):
    """A regressor's prediction: the quantiles of each target at a few levels.

    Several hypotheses are pooled by the mean of their quantiles at each level, because the mixture of their distributions is unknown
    beyond the outermost levels. ``interval(0.8)`` uses levels 0.1 and 0.9. Between two levels, quantiles are interpolated linearly
    in the level. Beyond the outermost levels nothing is known, so a quantile or an interval there raises an error.

    Args:
        member_quantiles: Quantiles [Z, B, D, Q], or [Z, B, H, D, Q] over a horizon, in increasing order along the last axis;
            Z = 1 for one network.
        levels: Their levels [Q] in (0, 1), in increasing order.
        members_variance: For pooled hypotheses: the mean over the levels of their variance [B, D]; ``member_quantiles``
            [1, B, D, Q] is then their mean.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes do not fit together, the levels are out of range or order, or quantiles cross.

    Source: Koenker & Bassett, Econometrica 46 (1978), for quantile regression; Ratcliff, Psychological Bulletin 86 (1979), for
    the mean of quantiles (Vincent averages).

    Example:
        >>> quantiles = torch.tensor([[[[-1.0, 0.0, 2.0]]]])  # Z, B, D, Q = 1, 1, 1, 3
        >>> prediction = QuantilePrediction(quantiles, torch.tensor([0.1, 0.5, 0.9]))
        >>> prediction.median, prediction.interval(0.8)
        (tensor([[0.]]), (tensor([[-1.]]), tensor([[2.]])))
    """

    score_names: ClassVar[tuple[str, ...]] = ("interval_width", "epistemic_variance")

    _reason: ClassVar[str] = "a few quantiles do not determine it"

    member_quantiles = Field("Quantiles [Z, B, D, Q] in increasing order.", batch_axis=1, unit="location")
    levels = Field("Levels of the quantiles [Q].", batch_axis=None)

    def _check(self) -> None:
        quantiles, levels = self.member_quantiles, self.levels
        if quantiles.ndim < 4 or levels.ndim != 1 or quantiles.shape[-1] != len(levels):
            raise InputError(
                "`member_quantiles` must have shape [Z, B, D, Q] and `levels` [Q], but their shapes are "
                f"{list(quantiles.shape)} and {list(levels.shape)}."
            )
        super()._check()

    def _check_values(self) -> None:
        check_levels(self.levels)
        if bool((self.member_quantiles.diff(dim=-1) < 0).any()):
            raise InputError(
                "`member_quantiles` must increase along the last axis, but some cross. Pass `member_quantiles.sort(-1).values`."
            )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy on another device or in another dtype. The levels keep their dtype, since half precision cannot represent most of them."""
        moved = super().to(*args, **kwargs)
        tensors = dict(moved.__getstate__())
        return self._from_tensors({**tensors, "levels": self.levels.to(moved.member_quantiles.device)})

    @property
    def target_shape(self) -> torch.Size:
        """The shape [B, ..., D] of the targets."""
        return self.member_quantiles.shape[1:-1]

    @property
    def _members(self) -> Tensor:
        return self.member_quantiles

    def _spread(self) -> Tensor:
        return variance_over(upcast(self.member_quantiles)).mean(-1)

    @property
    def quantiles(self) -> Tensor:
        """Mean over the hypotheses of their quantiles [B, D, Q]."""
        return upcast(self.member_quantiles).mean(0)

    @property
    def median(self) -> Tensor:
        """Quantile at level 0.5 [B, D]."""
        return self.quantile(0.5)

    @property
    def point(self) -> Tensor:
        """The median [B, D]."""
        return self.median

    @property
    def mean(self) -> Tensor:
        """Raise an error: a few quantiles do not determine the tails."""
        raise InputError("A QuantilePrediction has no `mean`: a few quantiles do not determine it. Read `median`.")

    @property
    def interval_width(self) -> Tensor:
        """Distance between the outermost quantiles [B, D], in the target's units."""
        quantiles = self.quantiles
        return quantiles[..., -1] - quantiles[..., 0]

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] at a ``level`` between the outermost predicted ones."""
        check_open_unit("level", level)
        if torch.compiler.is_compiling() and len(self.levels) > 1:  # a graph has no values to look up the level
            return _quantile_in_graph(self.quantiles, self.levels, level)
        return quantile_at(self.quantiles, self._level_list, level)

    def pinball(self, target: Tensor) -> Tensor:
        """Mean over the levels of the pinball loss [B, D], in the target's units; lower is better."""
        return pinball(self.quantiles, self._checked(target).unsqueeze(-1), self.levels.to(self.quantiles)).mean(-1)

    def covered(self, target: Tensor, level: float) -> Tensor:
        """Whether the target lies in the central interval of this level: bool [B, D]; False for a missing target."""
        (lower, upper), target = self.interval(level), self._checked(target)
        return (lower <= target) & (target <= upper)

    def counts_below(self, target: Tensor, levels: Sequence[float]) -> Tensor:
        """Number of known targets at or below the predicted quantile of each level: [L] in float64."""
        target = self._checked(target)
        return torch.stack([widen(target <= self.quantile(level)).sum() for level in levels])

    def scaling_rows(self, target: Tensor) -> tuple[Tensor, ...]:
        """Residuals [B, ..., D] from the median; distances from the median to the quantiles, and their levels [B, Q, ..., D]."""
        quantiles, median = self.quantiles, self.median
        offset = (quantiles - median.unsqueeze(-1)).movedim(-1, 1)
        levels = self.levels.to(offset).reshape(1, -1, *[1] * (offset.ndim - 2)).expand_as(offset)
        return self._checked(target).to(median) - median, offset, levels

    def recalibration_rows(self, target: Tensor) -> Tensor:
        """Probabilities [B, ..., D] of targets: linear between the quantiles, with exponential tails beyond them."""
        self._check_several_levels()
        return extended_cdf(self.quantiles, self.levels, self._checked(target))

    def recalibrated(self, knots: Tensor) -> "QuantilePrediction":
        """The quantiles of the calibrated distribution at the same levels."""
        self._check_several_levels()
        self._check_knots(knots)
        if self._get("recalibration") is not None:
            raise InputError(
                f"This {type(self).__name__} was already recalibrated. Recalibrate the prediction that it was made from."
            )
        if self.is_pooled:
            raise InputError(
                "A recalibration needs the members, which were pooled when this prediction was made. Set `module.return_members = True` to "
                "keep them."
            )
        quantiles = upcast(self.member_quantiles)
        shape = -1, *[1] * len(self.map_shape)
        levels = uncalibrated_levels(self.levels, knots.to(quantiles.device)).T
        moved = [extended_quantile(quantiles, self.levels, level.reshape(shape)) for level in levels]
        new = running_maximum(torch.stack(moved, -1))  # after rounding, equal quantiles may cross
        tensors = {"member_quantiles": new.to(self.member_quantiles.dtype), "recalibration": knots}
        return self._from_tensors({**self.__dict__["_tensors"], **tensors})

    def _check_several_levels(self) -> None:
        if len(self.levels) < 2:
            raise InputError(
                "A recalibration needs quantiles at two levels or more, but there is one. Predict more `levels`."
            )

    def cdf(self, target: Tensor) -> Tensor:
        """Raise an error: the distribution is unknown beyond the outermost quantiles."""
        self._refuse_beyond("cdf")

    def crps(self, target: Tensor) -> Tensor:
        """Raise an error: the distribution is unknown beyond the outermost quantiles."""
        self._refuse_beyond("crps")

    def _refuse_beyond(self, name: str) -> NoReturn:
        raise InputError(
            f"A QuantilePrediction has no `{name}`: nothing is known beyond its outermost quantiles. Read `pinball`, `interval` or "
            "`covered`."
        )

    def pool(self) -> "QuantilePrediction":
        """The prediction in which the mean quantiles replace the members."""
        pooled = self._pooled(member_quantiles=self.quantiles.unsqueeze(0))
        assert isinstance(pooled, QuantilePrediction)
        return pooled

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``quantile_<level>`` for each level, ``epistemic_variance`` of several hypotheses, and ``log_density`` if fitted.

        Args:
            interval: Level of a central interval, whose bounds ``lower`` and ``upper`` are added if they are inside the predicted levels.

        While a graph is traced, the levels are unknown, and the names contain their positions instead.
        """
        quantiles, num = self.quantiles, len(self.levels)
        levels = range(num) if torch.compiler.is_compiling() else self._level_list
        named = {f"quantile_{level:.4g}": quantiles[..., i] for i, level in enumerate(levels)}
        if interval is not None and levels[0] - 1e-6 <= (1 - interval) / 2 and (1 + interval) / 2 <= levels[-1] + 1e-6:
            named |= dict(zip(("lower", "upper"), self.interval(interval), strict=True))
        return self._columns({**named, **self._member_spread()})

    @property
    def _level_list(self) -> list[float]:
        levels: list[float] = self.levels.tolist()
        return levels


def _quantile_in_graph(quantiles: Tensor, levels: Tensor, level: float) -> Tensor:
    """Compute :func:`~lightning_uq.functional.quantile_at` with operators that do not read the values of ``levels`` [Q]."""
    above = (levels < level).sum().clamp(1, len(levels) - 1).reshape(1)
    (low, high), (left, right) = (
        [values.index_select(-1, place) for place in (above - 1, above)] for values in (levels, quantiles)
    )
    share = ((level - low) / (high - low)).clamp(0, 1).to(quantiles.dtype)
    return (left + share * (right - left)).squeeze(-1)
