"""Scores of regression: log-density, CRPS, and the errors of the mean.

NaN marks missing targets, which are left out.
"""

from typing import Any

from torch import Tensor

from lightning_uq.functional.mixture import gaussian_log_prob
from lightning_uq.functional.precision import widen
from lightning_uq.functional.targets import known_targets, sum_over_targets
from lightning_uq.functional.validation import check_bool
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution


class RegressionNLL(MeanMetric):
    """Mean negative log-density of the target [B, D], in nats per row (summed over its known numbers), with the constant log(2 pi) / 2.

    Args:
        moment_matched: Whether to score the Gaussian with the prediction's mean and variance, as in the table of the deep-ensembles
            paper, instead of the prediction itself.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

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
            target: [B, D]; NaN marks a missing value.

        Raises:
            InputError: Shapes differ, a variance is not positive, or a value is infinite.
        """
        found, target = as_distribution(prediction, target, self.validate_args)
        value, known = known_targets(target)
        if self.moment_matched:
            log_prob = gaussian_log_prob(found.mean, found.variance, value).unsqueeze(0)
            nll = -sum_over_targets(log_prob, known).squeeze(0)
        else:
            nll = -found.log_prob(target)
        self._add(nll, known.flatten(1).any(1))


class CRPS(MeanMetric):
    """Mean continuous ranked probability score of the mixture, in the target's units, averaged over rows and dimensions.

    It is computed in closed form, is a proper score, and is less sensitive to outlying targets than the log-density.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

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
        found, target = as_distribution(prediction, target, self.validate_args)
        self._add(found.crps(target), ~target.isnan())


class RMSE(MeanMetric):
    """Root mean squared error of the mixture's mean, in the target's units, over rows and dimensions.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

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
        found, target = as_distribution(prediction, target, self.validate_args)
        self._add((widen(found.mean) - widen(target)).square(), ~target.isnan())

    def compute(self) -> Tensor:
        """The root of the mean over all rows and dimensions; NaN without rows."""
        return super().compute().sqrt()


class MAE(MeanMetric):
    """Mean absolute error of the mean, or of the median of quantiles, in the target's units, over rows and dimensions.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = MAE()
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[3.0], [-4.0]]))
        >>> metric.compute()
        tensor(3.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("absolute_error", validate_args=validate_args, **kwargs)

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        self._add((widen(found.point) - widen(target)).abs(), ~target.isnan())
