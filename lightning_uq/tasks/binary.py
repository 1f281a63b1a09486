"""One binary label per input: a sigmoid of one logit."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.losses.labels import label_losses
from lightning_uq.metrics import (
    Accuracy,
    BrierScore,
    ExpectedCalibrationError,
    JointLogLoss,
    LabelAUROC,
    LabelAveragePrecision,
    NegativeLogLikelihood,
)
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks.base import CalibrationRows, OutputShapeError, Progress, Stage, Task, sums_and_counts
from lightning_uq.tasks.labels import (
    check_label_loss,
    check_label_values,
    checked_pos_weight,
    known_labels,
    warn_of_probabilities,
)
from lightning_uq.tasks.row_scores import binary_row_scores


@dataclass(frozen=True)
class Binary(Task):
    """One logit l per input, [Z, B] or [Z, B, 1], and labels 0 or 1 of any dtype, [B] or [B, 1].

    The prediction is that of a softmax over the logits [0, l], which equals sigmoid(l): ``probs`` is [B, 2], and ``probs[:, 1]`` the
    probability of label 1. The confidence is therefore max(p, 1 - p), and every calibration, score and metric of classes applies.

    Args:
        loss: ``"bce"``, or ``"focal"``; see :func:`~lightning_uq.losses.label_losses`.
        pos_weight: Weight of label 1 in the loss, as in ``BCEWithLogitsLoss``.
        label_smoothing: Factor s in [0, 1]; the smoothed target is (1 - s) y + s / 2.
        focal_gamma: Exponent of the focal loss.

    Raises:
        InputError: A field is out of range.

    Example:
        >>> import torch
        >>> Binary().predict(torch.zeros(5, 2)).probs
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
        >>> Binary().sample_losses(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))
        (tensor([0.6931, 0.6931]), tensor([1., 1.]))
    """

    loss: Literal["bce", "focal"] = "bce"
    pos_weight: float | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0

    ood_score: ClassVar[str] = "predictive_entropy"
    score_names: ClassVar[tuple[str, ...]] = CategoricalPrediction.score_names
    metric_on_bar: ClassVar[str | None] = "accuracy"
    has_classes: ClassVar[bool] = True
    takes_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_label_loss(self.loss, self.label_smoothing, self.focal_gamma)
        weight = checked_pos_weight(self.pos_weight)
        if isinstance(weight, tuple):
            raise InputError(f"`pos_weight` must be one number, but it is {self.pos_weight!r}.")
        object.__setattr__(self, "pos_weight", weight)

    @property
    def num_outputs(self) -> int | None:
        """One."""
        return 1

    def predict(self, outputs: Tensor) -> CategoricalPrediction:
        """A categorical prediction over the logits [0, l]."""
        logit = outputs.squeeze(2) if outputs.ndim == 3 else outputs
        return CategoricalPrediction(torch.stack([torch.zeros_like(logit), logit], 2))

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample; the counts are 1."""
        return sums_and_counts(
            label_losses(
                output.reshape(len(output)),
                target.reshape(len(target)),
                self.loss,
                pos_weight=self.pos_weight,
                label_smoothing=self.label_smoothing,
                focal_gamma=self.focal_gamma,
            )
        )

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Accuracy, NLL, ECE, AUROC and average precision of label 1; for a test also the Brier score and the joint log-loss."""
        found: dict[str, Metric] = {
            "accuracy": Accuracy(validate_args=False),
            "nll": NegativeLogLikelihood(validate_args=False),
            "ece": ExpectedCalibrationError(validate_args=False),
            "auroc": LabelAUROC(validate_args=False),
            "average_precision": LabelAveragePrecision(validate_args=False),
        }
        if stage == "val":
            return found
        further = {"brier": BrierScore(validate_args=False), "joint_log_loss": JointLogLoss(validate_args=False)}
        return {**found, **further}

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for one logit per input, [Z, B] or [Z, B, 1]."""
        if outputs.ndim > 3:
            raise OutputShapeError(
                f"A network for Binary() must return one logit per input, but it returned a map of shape {list(outputs.shape[1:])}. For "
                "one logit per pixel, pass `task=Segmentation()` and `output=lambda logit: torch.cat([torch.zeros_like(logit), "
                "logit], 1)`."
            )
        if outputs.ndim != 2 and (outputs.ndim != 3 or outputs.shape[2] != 1):
            raise OutputShapeError(
                f"A network for Binary() must return one logit per input, [B] or [B, 1], but it returned shape "
                f"{list(outputs.shape[1:])}. Pass `task=Classification()` for a softmax over classes, `task=Multilabel()` for "
                "several labels, or a function that picks the logit as `output`."
            )
        if values:
            warn_of_probabilities(outputs)

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for labels [B] or [B, 1] that are 0, 1, or a probability."""
        num_rows = outputs.shape[1]
        if target.is_complex() or tuple(target.shape) not in ((num_rows,), (num_rows, 1)):
            raise InputError(
                f"The targets must have shape [{num_rows}] or [{num_rows}, 1], one label per input, but they are {target.dtype} of "
                f"shape {list(target.shape)}."
            )
        if values:
            labels = known_labels(target)
            if bool(labels.isnan().any()):
                raise InputError("The targets must be 0 or 1, but they hold NaN.")
            check_label_values(labels, "For more than two classes pass `task=Classification()`.")

    def accepts(self, target: Tensor) -> str | None:
        """The reason why labels are not binary, or None."""
        return None if bool(((target == 0) | (target == 1)).all()) else "the targets are not 0 or 1"

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """Labels [N] as class indices; target probabilities as [N, 2]."""
        labels = target.reshape(len(target))
        if self.accepts(labels) is None:
            return prediction, labels.long()
        return prediction, torch.stack([1 - labels, labels], 1)

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Correctness, negative log-probability, Brier score and confidence of the label, and the logit of label 1."""
        return binary_row_scores(*self.rows(prediction, target))

    def outputs_for(self, num_targets: int) -> int:
        """One."""
        return 1

    def calibration_rows(self, prediction: Any, target: Tensor) -> CalibrationRows:
        """The rows that a calibration is fitted to."""
        return CalibrationRows(*self.rows(prediction, target))
