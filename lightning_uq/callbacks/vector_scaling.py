"""Vector scaling after training: a scale and a bias per class, fitted on the validation data."""

import torch
from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration, rounded_for
from lightning_uq.functional.precision import widen
from lightning_uq.functional.vector_scaling import fit_vector_scaling
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.running.classes import FittingRows
from lightning_uq.running.transforms import PredictionTransform


class VectorScaling(Calibration):
    """A scale and a bias per class, with a ridge towards the fitted temperature, on any LightningModule that classifies.

    The ridge's strength is chosen by five-fold validation likelihood; where no strength beats the temperature alone, it is
    the temperature. Applied to the log of the mean probabilities: members stay as they are.

    Args:
        fitting: ``max_rows`` (above 2^20 rows, a random sample of so many is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 4.2.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
        >>> target = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 0, 1]).repeat(10)  # class 1 is over-predicted
        >>> scale, bias = VectorScaling().fit_logits(logits, target).class_scaling
        >>> bool(bias[0] > bias[1])
        True
    """

    tensor_name = "class_scaling"
    needs_classes = True

    @property
    def class_scaling(self) -> Tensor:
        """Scale and bias [2, C] in float64.

        Raises:
            NotFittedError: Nothing was fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scaling of the log of the mean probabilities."""
        rows = CategoricalPrediction(widen(logits)).log_probs
        order = _order(rows, labels)  # ranks hand over rows in orders of their own, and the folds must not differ
        fit = fit_vector_scaling(rows[order], labels[order])
        return {"class_scaling": torch.stack([fit.scale, fit.bias])}

    def calibrated_rows(
        self, prediction: CategoricalPrediction, rows: FittingRows, tensors: dict[str, Tensor]
    ) -> CategoricalPrediction:
        """The fitting rows, scaled."""
        return prediction.replace(class_scaling=tensors["class_scaling"])

    def transform(self) -> "ClassScalingTransform":
        """Predictions carry the class scaling."""
        return ClassScalingTransform(self.class_scaling)


class ClassScalingTransform(PredictionTransform):
    """Adds a pooled class scaling to a prediction.

    Args:
        class_scaling: Scale and bias [2, C].
    """

    kind = "calibration"

    def __init__(self, class_scaling: Tensor) -> None:
        self.class_scaling = class_scaling

    def apply(self, prediction: Prediction) -> Prediction:
        """The calibrated prediction."""
        return prediction.replace(class_scaling=rounded_for(self.class_scaling, prediction))


def _order(rows: Tensor, labels: Tensor) -> Tensor | slice:
    """An order of rows [N, C] by what they hold: only rows that are equal may change places."""
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        return slice(None)  # an error that the fit will tell
    direction = torch.randn(rows.shape[1], dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
    by_value = (rows.clamp_min(torch.finfo(torch.float32).min) @ direction).argsort(stable=True)
    return by_value[labels[by_value].argsort(stable=True)]
