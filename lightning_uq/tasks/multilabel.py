"""Several binary labels per input: a sigmoid per label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer
from lightning_uq.losses.labels import label_losses
from lightning_uq.metrics import (
    LabelAccuracy,
    LabelAUROC,
    LabelAveragePrecision,
    LabelBrierScore,
    LabelCalibrationError,
    LabelNLL,
)
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction
from lightning_uq.tasks.base import CalibrationRows, OutputShapeError, Progress, Stage, Task, sums_and_counts
from lightning_uq.tasks.classification import check_ignore_index
from lightning_uq.tasks.labels import (
    check_label_loss,
    check_label_values,
    checked_pos_weight,
    known_labels,
    warn_of_probabilities,
)
from lightning_uq.tasks.row_scores import label_row_scores


@dataclass(frozen=True)
class Multilabel(Task):
    """L binary labels per input: logits [Z, B, L] and targets [B, L] of any dtype. Labels are independent given the index.

    The loss is the mean over all known labels of the batch. Unknown labels (NaN or ``ignore_index``) count neither in the loss nor
    in the metrics.

    Args:
        num_labels: L. If given, the output is checked against it; None takes it from the network's output.
        ignore_index: A value that marks unknown labels, in addition to NaN.
        loss: ``"bce"``, or ``"focal"``; see :func:`~lightning_uq.losses.label_losses`.
        pos_weight: Weight of label 1 in the loss, as in ``BCEWithLogitsLoss``: a number, or one per label.
        label_smoothing: Factor s in [0, 1]; the smoothed target is (1 - s) y + s / 2.
        focal_gamma: Exponent of the focal loss.

    Raises:
        InputError: A field is out of range.

    Example:
        >>> import torch
        >>> Multilabel().predict(torch.zeros(5, 2, 3)).probs.shape
        torch.Size([2, 3])
        >>> Multilabel().sample_losses(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, float("nan")]]))
        (tensor([1.3863]), tensor([2.]))
    """

    num_labels: int | None = None
    ignore_index: int | None = None
    loss: Literal["bce", "focal"] = "bce"
    pos_weight: float | Sequence[float] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0

    ood_score: ClassVar[str] = "predictive_entropy"
    score_names: ClassVar[tuple[str, ...]] = BernoulliPrediction.score_names
    metric_on_bar: ClassVar[str | None] = "auroc"
    takes_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_labels is not None:
            check_integer("num_labels", self.num_labels, 1)
        check_ignore_index(self.ignore_index)
        check_label_loss(self.loss, self.label_smoothing, self.focal_gamma)
        weight = checked_pos_weight(self.pos_weight)
        if isinstance(weight, tuple) and self.num_labels not in (None, len(weight)):
            raise InputError(
                f"`pos_weight` must hold {self.num_labels} numbers, one per label, but it holds {len(weight)}."
            )
        object.__setattr__(self, "pos_weight", weight)

    @property
    def num_outputs(self) -> int | None:
        """L, if given."""
        return self.num_labels

    def predict(self, outputs: Tensor) -> BernoulliPrediction:
        """A prediction of L labels with one row of logits per hypothesis."""
        return BernoulliPrediction(outputs)

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample's known labels; the counts are their numbers."""
        labels = known_labels(target, self.ignore_index)
        losses = label_losses(
            output,
            labels,
            self.loss,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
        )
        return sums_and_counts(losses, (~labels.isnan()).to(losses.dtype))

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """AUROC, NLL, ECE and accuracy, as means over the labels; for a test also the average precision and the Brier score."""
        found: dict[str, Metric] = {
            "auroc": LabelAUROC(validate_args=False),
            "nll": LabelNLL(validate_args=False),
            "ece": LabelCalibrationError(validate_args=False),
            "accuracy": LabelAccuracy(validate_args=False),
        }
        if stage == "val":
            return found
        further = {
            "average_precision": LabelAveragePrecision(validate_args=False),
            "brier": LabelBrierScore(validate_args=False),
        }
        return {**found, **further}

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for logits [Z, B, L]."""
        if outputs.ndim != 3 or not outputs.shape[2]:
            raise OutputShapeError(
                f"A network for Multilabel() must return one logit per label, [B, L], but it returned shape "
                f"{list(outputs.shape[1:])}. Pass `task=Binary()` for a single label, or a function that picks the logits "
                "as `output`."
            )
        if self.num_labels is not None and outputs.shape[2] != self.num_labels:
            raise InputError(
                f"The network must return {self.num_labels} logits (`num_labels` of the task), but it returned "
                f"{outputs.shape[2]} numbers, perhaps features. Pass a function that computes the logits as `output`."
            )
        if isinstance(self.pos_weight, tuple) and outputs.shape[2] != len(self.pos_weight):
            raise InputError(
                f"`pos_weight` must hold {outputs.shape[2]} numbers, one per label of the network's output, but it holds "
                f"{len(self.pos_weight)}."
            )
        if values:
            warn_of_probabilities(outputs)

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for labels [B, L] that are 0, 1, a probability, or unknown."""
        expected = outputs.shape[1:3]
        if target.is_complex() or target.shape != expected:
            advice = " Pass `task=Classification()` for one class per input." if target.ndim == 1 else ""
            raise InputError(
                f"The targets must have shape {list(expected)}, one label per logit, but they are {target.dtype} of shape "
                f"{list(target.shape)}.{advice}"
            )
        if values:
            unknown = "" if self.ignore_index is not None else " Pass `ignore_index` if a value marks unknown labels."
            check_label_values(known_labels(target, self.ignore_index), unknown.strip())

    def accepts(self, target: Tensor) -> str | None:
        """The reason why targets are not labels [B, L] that are 0, 1 or unknown, or None."""
        labels = known_labels(target, self.ignore_index)
        fits = target.ndim == 2 and bool(((labels == 0) | (labels == 1) | labels.isnan()).all())
        return None if fits else "the targets are not labels [B, L] that are 0 or 1"

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """Labels [B, L], with NaN for unknown labels."""
        return prediction, known_labels(target, self.ignore_index)

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Negative log-likelihood and Brier score as means over the known labels, and the logits and labels themselves."""
        return label_row_scores(*self.rows(prediction, target))

    def row_positions(self, target: Tensor) -> Tensor:
        """The positions of the known labels."""
        return (~known_labels(target, self.ignore_index).isnan()).reshape(-1).nonzero().squeeze(1)

    def calibration_rows(self, prediction: Any, target: Tensor) -> CalibrationRows:
        """Every known label as a row over the logits [0, l], and the number of its label."""
        labels = known_labels(target, self.ignore_index)
        known = ~labels.isnan()
        logits = prediction.calibration_logits[:, known]
        which = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[known]
        rows = CategoricalPrediction(torch.stack([torch.zeros_like(logits), logits], 2))
        hard = labels[known]
        return CalibrationRows(
            rows, hard.long() if bool(((hard == 0) | (hard == 1)).all()) else hard, which, labels.shape[1]
        )
