"""One factor for the predicted variance of each target, for any LightningModule that predicts numbers."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.calibration import rounded_for
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
from lightning_uq.functional.variance_scaling import fit_quantile_stretch, fit_residual_variance, fit_stretch
from lightning_uq.method import Method, Setting
from lightning_uq.predictions import Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task


class VarianceScaling(HeldOutCallback):
    """Multiplies the predicted variance of each target by a factor s^2 that is fitted to the validation data.

    The distribution is stretched about its mean: y becomes mean + s (y - mean). The mean does not change, the aleatoric and the epistemic variance
    grow by the same factor, and intervals widen by s. Predictions keep their type:

    - Gaussians, Student-t and mixtures: the factor maximizes the likelihood of the target's marginal. For a single Gaussian, s^2 is the mean of
      (y - mean)^2 / variance. Degrees of freedom and weights do not change.
    - Quantiles: their distances from the median are multiplied by the s that minimizes the pinball loss. The levels must include 0.5 in their range.
    - Means without a variance: the factor is the variance of the targets about them. Predictions become Gaussians, one per hypothesis,
      with this aleatoric variance. The spread of several hypotheses is the epistemic variance.

    Each of the D targets has its own factor, which the steps of a horizon and the positions of a map
    share. A factor of 1 means that the variance was right on average. Missing targets (NaN) are skipped.

    Predictions carry ``variance_scale`` [D]. A test logs ``uq/test_nll``, ``uq/test_crps`` and ``uq/test_coverage_95`` (for quantiles, the metrics
    of their task) before the scaling and, with the suffix ``_calibrated``, after it. :func:`load_fitted` builds it into a plain module, which can be exported.

    Args:
        fitting: ``max_rows`` (2^16 by default), and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader),
            ``weights``, ``name``, ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Laves et al., MIDL 2020 (arXiv 2006.13092); Levi et al., Sensors 22 (2022) (arXiv 1905.11659).

    Example:
        >>> from lightning_uq.predictions import PointPrediction
        >>> prediction = PointPrediction(torch.zeros(1, 2, 1))
        >>> scaling = VarianceScaling().fit_predictions(prediction, torch.tensor([1.0, -3.0]))
        >>> scaling.change(prediction).variance
        tensor([[5.],
                [5.]])
    """

    recalibrates = True
    whens = ("", "_calibrated")

    def __init__(self, *, max_rows: int | None = 2**16, **fitting: Any) -> None:
        super().__init__(max_rows=max_rows, **fitting)

    def check_task(self, task: Task) -> None:
        """Reject a task without numbers."""
        check_numeric(task, type(self).__name__)

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the fit from such predictions: see :meth:`NumberPrediction.scaling_rows`."""
        self.preview(check_rows(prediction))
        found: tuple[Tensor, ...] = prediction.scaling_rows(target)
        residual = found[0] if len(found) > 1 else found[0].amax(1)
        check_known(residual, target)
        return found

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The factor of each target."""
        fits: dict[int, Callable[..., Tensor]] = {1: fit_residual_variance, 3: fit_quantile_stretch}
        fit = fits.get(len(rows), fit_stretch)
        return {"variance_scale": fit(*rows)}

    @property
    def variance_scale(self) -> Tensor:
        """The factors s^2 [D] in float64; for means without a variance, their variances.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["variance_scale"]
        return found

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """``variance_scale``, or ``variance_scale/0``, ``variance_scale/1`` and so on for several targets."""
        factors = self.variance_scale.tolist()
        if len(factors) == 1:
            return {"variance_scale": factors[0]}
        return {f"variance_scale/{d}": factor for d, factor in enumerate(factors)}

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Reject a state of another kind.

        Raises:
            InputError: The state has no factor.
        """
        check_state(type(self).__name__, "variance_scale", tensors)

    def preview(self, prediction: Prediction) -> Prediction:
        """The prediction with a factor of 1."""
        numbers = check_numbers(prediction)
        dims = numbers.target_shape[numbers.target_axis]
        return numbers.scaled(torch.ones(dims, device=numbers.device))

    def transform(self) -> "ScalingTransform":
        """The transform that scales predictions."""
        return ScalingTransform(self.variance_scale, self.carried())

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The task's metrics of a distribution. For means, they are those of a Gaussian, only after the change."""
        return distribution_metrics(task, when)


class ScalingTransform(PredictionTransform):
    """Multiplies the variance of each target.

    Args:
        factor: s^2 [D].
        carried: The calibrations that a prediction must carry.
    """

    kind = "variance scale"

    def __init__(self, factor: Tensor, carried: Carried) -> None:
        self.factor = factor
        self.carried = carried

    def apply(self, prediction: Prediction) -> Prediction:
        """The scaled prediction."""
        numbers = check_numbers(prediction)
        self.carried.check(numbers)
        return numbers.scaled(rounded_for(self.factor, numbers).to(numbers.device))


def _fit(setting: Setting) -> list[Callback]:
    return [VarianceScaling()]


METHOD = Method(
    name="ensemble_mean_scaled",
    about="the ensemble of means, and a noise variance that is fitted to the validation rows",
    trained_as="ensemble_mean",
    callbacks=_fit,
    ood_score="epistemic_variance",
    tasks=("regression",),
    link="https://arxiv.org/abs/2006.13092",
)
