"""Calibration metrics of regression: coverage of intervals, and quantile levels against observed shares."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_uq.functional import regression
from lightning_uq.functional.precision import widen
from lightning_uq.functional.quantiles import check_levels
from lightning_uq.functional.validation import check_choice, check_integer, check_open_unit
from lightning_uq.metrics.base import MeanMetric, UncertaintyMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution


class IntervalCoverage(MeanMetric):
    """Share of targets inside the mixture's central interval; for calibrated predictions it equals the level.

    Args:
        level: Share of probability in the interval, in (0, 1).
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``level`` is not in (0, 1).

    Example:
        >>> import torch
        >>> metric = IntervalCoverage(level=0.9)
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[1.6], [1.7]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = None
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, level: float = 0.9, validate_args: bool = True, **kwargs: Any) -> None:
        check_open_unit("level", level)
        # Two levels may cover the same rows of the first batch, but must not share a state in a collection.
        super().__init__(f"covered_{float(level).hex().replace('.', '_')}", validate_args=validate_args, **kwargs)
        self.level = level

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        self._add(found.covered(target, self.level), ~target.isnan())


class QuantileCalibrationError(UncertaintyMetric):
    """Distance between quantile levels and the shares of targets below the predicted quantiles. :meth:`plot` draws the shares.

    Kuleshov et al. sum weighted squares of these differences; "l2" is the root of their mean. Two libraries use the share of targets
    inside central intervals instead: torch-uncertainty's metric of this name, at levels from 0.05 to 0.95, and uncertainty-toolbox's
    ``mean_absolute_calibration_error`` by default, at levels from 0 to 1. The numbers are not comparable: a biased prediction errs at
    both ends of an interval in one direction, which partly cancels.

    Args:
        num_levels: Number of levels k / (num_levels + 1).
        levels: The levels instead, in increasing order. A quantile prediction needs its own levels here.
        norm: "l1" for the mean absolute, "l2" for the root mean squared, "max" for the largest difference.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: An argument is unknown or out of range.

    Source: Kuleshov et al., ICML 2018 (arXiv 1807.00263).

    Example:
        >>> import torch
        >>> metric = QuantileCalibrationError(num_levels=3)
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[-9.0], [0.1]]))
        >>> metric.compute()
        tensor(0.1667, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    below: Tensor
    count: Tensor

    def __init__(
        self,
        num_levels: int = 99,
        norm: Literal["l1", "l2", "max"] = "l1",
        validate_args: bool = True,
        *,
        levels: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_integer("num_levels", num_levels, 1)
        check_choice("norm", norm, ("l1", "l2", "max"))
        self.norm = norm
        self.levels = check_levels(regression.quantile_levels(num_levels) if levels is None else levels)
        self._add_sum("below", len(self.levels))
        self._add_sum("count")

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        self.below = self.below + found.counts_below(target, self.levels)
        self.count = self.count + widen((~target.isnan()).sum())

    def compute(self) -> Tensor:
        """The error in [0, 1]; NaN without targets."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return regression.quantile_calibration_error(self.below, self.count, self.norm, levels)

    def _draw(self, ax: Any) -> None:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        value = regression.quantile_calibration_error(self.below, self.count, self.norm, levels)
        ax.plot([0, 1], [0, 1], linestyle="--", color="grey")
        self._draw_curve(ax, levels, self.below / self.count, "predicted level", "observed share below", value)
        ax.set(xlim=(0, 1), ylim=(0, 1))
