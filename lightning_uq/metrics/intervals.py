"""Metrics of prediction intervals: their score, and their width.

NaN marks missing targets, which are left out.
"""

from typing import Any

from torch import Tensor

from lightning_uq.functional.intervals import interval_score
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution


def _state(name: str, level: float) -> str:
    """The name of a state for one level, because metrics of two levels must not share it in a collection."""
    return f"{name}_{float(level).hex().replace('.', '_')}"


class IntervalScore(MeanMetric):
    """Mean interval score (Winkler score) of the central intervals, in the target's units; lower is better.

    (upper - lower) + 2 / (1 - level) times the distance of a target outside the interval. It rewards intervals that are narrow and
    contain as many targets as they claim.

    Args:
        level: Share of probability in the interval, in (0, 1).
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``level`` is not in (0, 1).

    Source: Winkler, JASA 67 (1972); Gneiting & Raftery, JASA 102 (2007), equation 43.

    Example:
        >>> import torch
        >>> metric = IntervalScore(level=0.9)
        >>> metric.update((torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), torch.zeros(1, 1))
        >>> metric.compute()
        tensor(3.2897, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, level: float = 0.9, validate_args: bool = True, **kwargs: Any) -> None:
        check_open_unit("level", level)
        super().__init__(_state("interval_score", level), validate_args=validate_args, **kwargs)
        self.level = level

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        self._add(interval_score(*found.interval(self.level), target, self.level), ~target.isnan())


class Sharpness(MeanMetric):
    """Sharpness of predictions, in the target's units: the mean width of a central interval, or the mean standard deviation.

    It does not measure whether predictions are right. Among equally calibrated predictions, sharper ones are better.

    Args:
        level: Share of probability in the interval, in (0, 1); None takes the standard deviation.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``level`` is not in (0, 1).

    Source: Gneiting et al., JRSS B 69 (2007).

    Example:
        >>> import torch
        >>> metric = Sharpness()
        >>> metric.update((torch.zeros(1, 1, 1), 4 * torch.ones(1, 1, 1)), torch.zeros(1, 1))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, level: float | None = None, validate_args: bool = True, **kwargs: Any) -> None:
        if level is not None:
            check_open_unit("level", level)
        name = "standard_deviation" if level is None else _state("interval_width", level)
        super().__init__(name, validate_args=validate_args, **kwargs)
        self.level = level

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`. The targets are used only to find missing values."""
        found, target = as_distribution(prediction, target, self.validate_args)
        if self.level is None:
            self._add(found.variance.sqrt(), ~target.isnan())
        else:
            lower, upper = found.interval(self.level)
            self._add(upper - lower, ~target.isnan())
