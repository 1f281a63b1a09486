"""Metrics of regression: a prediction is a distribution of the target, or the components of a Gaussian mixture."""

from typing import Any, Literal, Protocol

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import regression
from lightning_uq.functional._validation import (
    check_bool,
    check_choice,
    check_floating,
    check_integer,
    check_open_unit,
    to_sum_dtype,
)
from lightning_uq.functional.mixture import gaussian_log_prob
from lightning_uq.metrics.base import MeanMetric, UncertaintyMetric
from lightning_uq.predictions import GaussianMixturePrediction


class Distribution(Protocol):
    """A prediction object: the distribution of targets [B, D], one per dimension."""

    @property
    def mean(self) -> Tensor:
        """Mean [B, D]."""

    @property
    def variance(self) -> Tensor:
        """Variance [B, D]."""

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-density [B] of targets [B, D]."""

    def cdf(self, target: Tensor) -> Tensor:
        """Probability [B, D] of at most the target."""

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D]."""

    def to(self, *args: Any, **kwargs: Any) -> "Distribution":
        """A copy in another dtype."""


Predicted = Distribution | tuple[Tensor, Tensor]


def _distribution(prediction: Predicted, target: Tensor, validate: bool) -> Distribution:
    """The prediction, or the Gaussian mixture of a tuple (mean, variance) of tensors [Z, B, D]; checked with its target."""
    if isinstance(prediction, tuple) and len(prediction) == 2:
        regression.check_mixture(*prediction, target, validate=validate)
        return GaussianMixturePrediction(*prediction)
    if not all(hasattr(prediction, name) for name in ("mean", "log_prob", "cdf", "crps")):
        raise InputError(
            "Argument `prediction` must be a prediction with `mean`, `log_prob`, `cdf` and `crps`, or a tuple (mean, variance) "
            f"of tensors [Z, B, D], but it is a {type(prediction).__name__}."
        )
    found: Distribution = prediction
    check_floating("target", target, 1, "[B, D]")
    if target.shape != found.mean.shape:
        raise InputError(
            f"Argument `target` must have shape {list(found.mean.shape)}, but it has {list(target.shape)}; another shape would "
            "broadcast."
        )
    if validate:
        for name, value in (("mean", found.mean), ("target", target)):
            if not bool(value.isfinite().all()):
                raise InputError(f"Argument `{name}` must be finite, but it holds NaN or infinity.")
    return found


def _integral(prediction: Predicted, target: Tensor, validate: bool) -> Tensor:
    """The probability integral P(Y <= target) [B, D] in float64: close to 1 float32 has too few digits for a comparison."""
    wide = to_sum_dtype(target)
    return to_sum_dtype(_distribution(prediction, target, validate).to(wide.dtype).cdf(wide))


class RegressionNLL(MeanMetric):
    """Mean negative log-density of the target [B, D], in nats per row (summed over D), its log(2 pi) / 2 included.

    Args:
        moment_matched: Score the single Gaussian with the prediction's mean and variance, as in the deep-ensembles paper's
            table, instead of the prediction itself.
        validate_args: Check the values of each batch.
        kwargs: What every ``torchmetrics.Metric`` takes.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).

    Example:
        >>> import torch
        >>> metric = RegressionNLL()
        >>> metric.update((torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), torch.zeros(1, 1))  # Z, B, D = 1, 1, 1
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    higher_is_better: bool | None = False

    def __init__(self, moment_matched: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        check_bool("moment_matched", moment_matched)
        name = "regression_nll_moment_matched" if moment_matched else "regression_nll"
        super().__init__(name, validate_args=validate_args, **kwargs)
        self.moment_matched = moment_matched

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: A prediction object, or a tuple (mean, variance) of a Gaussian mixture, each [Z, B, D].
            target: [B, D].

        Raises:
            InputError: Shapes differ, a variance is not positive, or a value is NaN or infinite.
        """
        found = _distribution(prediction, target, self.validate_args)
        if self.moment_matched:
            self._add(-gaussian_log_prob(found.mean, found.variance, target).sum(-1))
        else:
            self._add(-found.log_prob(target))


class CRPS(MeanMetric):
    """Mean continuous ranked probability score of the mixture, in the target's units, averaged over rows and dimensions.

    In closed form; a proper score, and less sensitive to a target far out than the log-density.

    Args:
        validate_args: Check the values of each batch.
        kwargs: What every ``torchmetrics.Metric`` takes.

    Source: Gneiting & Raftery, JASA 102 (2007); Grimit et al., Q. J. R. Meteorol. Soc. 132 (2006).

    Example:
        >>> import torch
        >>> metric = CRPS()
        >>> metric.update((torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), torch.zeros(1, 1))
        >>> metric.compute()
        tensor(0.2337, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("crps", validate_args=validate_args, **kwargs)

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        self._add(_distribution(prediction, target, self.validate_args).crps(target))


class RMSE(MeanMetric):
    """Root mean squared error of the mixture's mean, in the target's units, over rows and dimensions.

    Args:
        validate_args: Check the values of each batch.
        kwargs: What every ``torchmetrics.Metric`` takes.

    Example:
        >>> import torch
        >>> metric = RMSE()
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[3.0], [4.0]]))
        >>> metric.compute()
        tensor(3.5355, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("squared_error", validate_args=validate_args, **kwargs)

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        center = _distribution(prediction, target, self.validate_args).mean
        self._add((to_sum_dtype(center) - to_sum_dtype(target)).square())

    def compute(self) -> Tensor:
        """The root of the mean over all rows and dimensions; NaN without one."""
        return super().compute().sqrt()


class IntervalCoverage(MeanMetric):
    """Share of targets inside the mixture's central interval; calibrated where it equals the level.

    Args:
        level: Share of probability in the interval, in (0, 1).
        validate_args: Check the values of each batch.
        kwargs: What every ``torchmetrics.Metric`` takes.

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
        # Two levels may cover the same rows of a first batch, and must not share a state in a collection.
        super().__init__(f"covered_{float(level).hex().replace('.', '_')}", validate_args=validate_args, **kwargs)
        self.level = level

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        self._add(regression.in_central_interval(_integral(prediction, target, self.validate_args), self.level))


class QuantileCalibrationError(UncertaintyMetric):
    """Distance between the levels k / (num_levels + 1) of predicted quantiles and the shares of targets below them.

    Args:
        num_levels: Number of levels.
        norm: "l1" for the mean absolute, "l2" for the root mean squared, "max" for the largest difference.
        validate_args: Check the values of each batch.
        kwargs: What every ``torchmetrics.Metric`` takes.

    Raises:
        InputError: An argument is not one of these.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_integer("num_levels", num_levels, 1)
        check_choice("norm", norm, ("l1", "l2", "max"))
        self.num_levels, self.norm = num_levels, norm
        self._add_sum("below", num_levels)
        self._add_sum("count")

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        integral = _integral(prediction, target, self.validate_args)
        self.below = self.below + regression.counts_below_quantiles(integral, self.num_levels)
        self.count = self.count + target.numel()

    def compute(self) -> Tensor:
        """The error in [0, 1]; NaN without a target."""
        return regression.quantile_calibration_error(self.below, self.count, self.norm)

    def _draw(self, ax: Any) -> None:
        levels = regression.quantile_levels(self.num_levels)
        value = regression.quantile_calibration_error(self.below, self.count, self.norm)
        ax.plot([0, 1], [0, 1], linestyle="--", color="grey")
        self._draw_curve(ax, levels, self.below / self.count, "predicted level", "observed share below", value)
        ax.set(xlim=(0, 1), ylim=(0, 1))


__all__ = ["CRPS", "RMSE", "IntervalCoverage", "QuantileCalibrationError", "RegressionNLL"]
