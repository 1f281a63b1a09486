"""A calibrated distribution function for each target, for any LightningModule that predicts distributions of numbers."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.carried import Carried
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.callbacks.number_calibration import (
    check_known,
    check_numbers,
    check_numeric,
    check_rows,
    check_state,
    distribution_metrics,
)
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.quantile_recalibration import LEAST, fit_recalibration
from lightning_uq.predictions import Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task


class QuantileRecalibration(HeldOutCallback):
    """Maps predicted probabilities of numbers to the observed frequencies of validation targets, so that a 90 % interval contains 90 % of them.

    If 30 % of the targets lie below the predicted 20 % quantile, that quantile becomes the 30 % quantile. The map R of each target is the
    empirical distribution function of P(Y <= y) over the validation rows at a few knots, with linear interpolation: see
    :func:`~lightning_uq.functional.quantile_recalibration.fit_recalibration`. It is monotone, so quantiles never cross. Each target has its own
    map, which the steps of a horizon and the positions of a map share. The map needs many rows: with fewer than 20 it is the
    identity, and with fewer than some hundreds :class:`VarianceScaling`, with one number per target, is safer. Missing targets (NaN) are skipped.

    - Gaussians, Student-t and mixtures become a :class:`RecalibratedPrediction`, whose ``cdf``, ``quantile``, ``interval``, ``log_prob``, ``crps``,
      ``mean`` and ``variance`` are those of the calibrated distribution. The density is the raw one times the slope of the map, so it is finite
      everywhere, with a step at each knot. The tails beyond the outermost knots keep their shape.
    - Quantiles become those of the calibrated distribution at the same levels, in a :class:`QuantilePrediction`. Beyond the outermost levels,
      the distribution is unknown, as before.
    - Means without a variance raise an error: put :class:`VarianceScaling` before this callback. Do the same if predictions are wrong by a large
      factor. Many targets then lie where predicted probabilities round to 0 or 1, and a warning says so.

    Predictions carry ``recalibration`` [2, D, K]. A test logs ``uq/test_nll``, ``uq/test_crps`` and ``uq/test_coverage_95`` (for quantiles, the metrics
    of their task) before the change and, with the suffix ``_calibrated``, after it. :func:`load_fitted` builds it into a plain module.
    ``torch.export`` of that module takes minutes, because the graphs of the mean and the variance are large.

    Args:
        fitting: ``max_rows`` (2^20 by default), and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader),
            ``weights``, ``name``, ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Kuleshov, Fenner & Ermon, ICML 2018 (arXiv 1807.00263).

    Example:
        >>> from lightning_uq.predictions import GaussianMixturePrediction
        >>> prediction = GaussianMixturePrediction(torch.zeros(1, 1000, 1), torch.ones(1, 1000, 1))
        >>> y = 2 * torch.special.ndtri(torch.linspace(0.0005, 0.9995, 1000))  # twice as far out as predicted
        >>> calibrated = QuantileRecalibration().fit_predictions(prediction, y).change(prediction[:1])
        >>> [round(bound.item(), 1) for bound in (*prediction[:1].interval(0.8), *calibrated.interval(0.8))]
        [-1.3, 1.3, -2.5, 2.5]
    """

    recalibrates = True
    whens = ("", "_calibrated")

    def check_task(self, task: Task) -> None:
        """Reject a task without numbers."""
        check_numeric(task, type(self).__name__)

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The probability integrals of the targets [N, ..., D], NaN where one is missing."""
        integral = check_rows(prediction).recalibration_rows(target)
        self.preview(prediction)
        check_known(integral, target)
        return (integral,)

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The knots of each target's map."""
        (integral,) = rows
        knots = fit_recalibration(integral)
        known = ~integral.isnan()
        lost = (known & ((integral <= LEAST) | (integral >= 1 - LEAST))).sum() / known.sum()
        if lost > 0.02:
            rank_zero_warn(
                f"{float(lost):.0%} of the targets of QuantileRecalibration lie where predicted probabilities round to 0 or 1. Put VarianceScaling "
                "before it."
            )
        if knots.shape[2] == 2:
            rank_zero_warn(
                f"QuantileRecalibration changes nothing: it needs 20 rows per target, but there are {int(known.flatten(0, -2).sum(0).max())}."
            )
        return {"recalibration": knots}

    @property
    def recalibration(self) -> Tensor:
        """The knots [2, D, K] of the maps in float64: predicted and calibrated probabilities.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["recalibration"]
        return found

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """``calibration_distance``: the largest distance of a map from the identity."""
        predicted, calibrated = self.recalibration
        return {"calibration_distance": float((predicted - calibrated).abs().max())}

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Reject a state of another kind.

        Raises:
            InputError: The state has no knots.
        """
        check_state(type(self).__name__, "recalibration", tensors)

    def preview(self, prediction: Prediction) -> Prediction:
        """The prediction with identity maps."""
        numbers = check_numbers(prediction)
        ends = torch.tensor([0.0, 1.0], device=numbers.device)
        return numbers.recalibrated(ends.expand(2, numbers.target_shape[numbers.target_axis], 2))

    def transform(self) -> "RecalibrationTransform":
        """The transform that recalibrates predictions."""
        return RecalibrationTransform(self.recalibration, self.carried())

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The task's metrics of a distribution. For means, they are those of a Gaussian, only after the change."""
        return distribution_metrics(task, when)


class RecalibrationTransform(PredictionTransform):
    """Maps the probabilities of each target.

    Args:
        knots: [2, D, K].
        carried: The calibrations that a prediction must carry.
    """

    kind = "recalibration"

    def __init__(self, knots: Tensor, carried: Carried) -> None:
        self.knots = knots
        self.carried = carried

    def apply(self, prediction: Prediction) -> Prediction:
        """The recalibrated prediction."""
        numbers = check_numbers(prediction)
        self.carried.check(numbers)
        return numbers.recalibrated(self.knots.to(numbers.device, wide_dtype(numbers.device)))
