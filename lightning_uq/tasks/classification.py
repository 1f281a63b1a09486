"""One label per input: a softmax over classes."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import is_short_row
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_at_least, check_choice
from lightning_uq.metrics import Accuracy, BrierScore, ExpectedCalibrationError, JointLogLoss, NegativeLogLikelihood
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks.base import CalibrationRows, OutputShapeError, Progress, Stage, Task, sums_and_counts
from lightning_uq.tasks.row_scores import class_row_scores, map_row_scores

NO_LABEL = -(2**63)
"""A value that no label has. Torch's default ignores -100, which would hide a wrong label."""


class ClassTask(Task):
    """The base of tasks with a class axis: the checks of logits and labels, and the metrics of probabilities."""

    num_classes: int | None
    metric_on_bar: ClassVar[str | None] = "accuracy"
    has_classes: ClassVar[bool] = True
    takes_calibration: ClassVar[bool] = True

    @property
    def num_outputs(self) -> int | None:
        """C, if given."""
        return self.num_classes

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Accuracy, NLL and ECE; for a test also the Brier score."""
        found: dict[str, Metric] = {
            "accuracy": Accuracy(validate_args=False),
            "nll": NegativeLogLikelihood(validate_args=False),
            "ece": ExpectedCalibrationError(validate_args=False),
        }
        return found if stage == "val" else {**found, "brier": BrierScore(validate_args=False)}

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Correctness, negative log-probability and Brier score of the class; for maps, means over the positions."""
        if prediction.map_shape:
            return map_row_scores(*self.sample_rows(prediction, target))
        return class_row_scores(*self.rows(prediction, target))

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for integer labels in [0, C), one per position of the output."""
        _check_dtype(target)
        expected = (*outputs.shape[1:2], *outputs.shape[3:])
        if target.shape != expected:
            for axis in range(1, target.ndim):
                if target.shape[axis] == 1 and (*target.shape[:axis], *target.shape[axis + 1 :]) == expected:
                    raise InputError(
                        f"The class labels must have shape {list(expected)}, because the network returns {list(outputs.shape[1:])}, but they have "
                        f"{list(target.shape)}. Remove their axis of size 1: pass `unpack_batch=lambda batch: (batch[0], batch[1].squeeze({axis}))`."
                    )
            raise InputError(
                f"The class labels must have shape {list(expected)}, because the network returns "
                f"{list(outputs.shape[1:])}, but they have {list(target.shape)}. If the network returns features, pass "
                "a function that computes the logits [B, C] as `output`."
            )
        if values:
            _check_range(self._counted(target), outputs.shape[2])

    def calibration_rows(self, prediction: Any, target: Tensor) -> CalibrationRows:
        """The rows of the metrics."""
        return CalibrationRows(*self.rows(prediction, target))

    def accepts(self, target: Tensor) -> str | None:
        """The reason why a target does not hold class labels (integers of at least 0), or None."""
        kept = self._counted(target)
        whole = not target.is_floating_point() and target.dtype != torch.bool
        return None if whole and bool((kept >= 0).all()) else "the targets are not class labels"

    def invalid(self, outputs: Tensor) -> Tensor:
        """Rows [Z, B, 1, ...] with NaN or plus infinity, or with minus infinity for all classes; for one class, it excludes that class."""
        return ~outputs.amax(2, keepdim=True).isfinite()  # the maximum is NaN if any number is

    def _counted(self, target: Tensor) -> Tensor:
        """The labels that count."""
        return target

    def _check_classes(self, outputs: Tensor, values: bool) -> None:
        """Check for at least two classes, the given number of classes, and raw outputs that are not probabilities."""
        if outputs.ndim > 3 and outputs.shape[2] == 1:
            raise OutputShapeError(
                f"The network returned {list(outputs.shape[1:])}, one logit per position, but {type(self).__name__} needs one logit per "
                "class. Pass `output=lambda logit: torch.cat([torch.zeros_like(logit), logit], 1)`, which is equivalent to a sigmoid."
            )
        if outputs.ndim < 3 or outputs.shape[2] < 2:
            raise OutputShapeError(
                f"The network must return logits [B, C] with C >= 2, but it returned shape {list(outputs.shape[1:])}. Pass "
                "`task=Binary()` for one logit per input, `task=Regression(head='mean')` for one number, or a function "
                "that computes the logits as `output`."
            )
        if self.num_classes is not None and outputs.shape[2] != self.num_classes:
            raise InputError(
                f"The network must return {self.num_classes} logits (`num_classes` of the task), but it returned "
                f"{outputs.shape[2]} numbers, perhaps features. Pass a function that computes the logits as `output`."
            )
        if values and outputs.numel():
            found = outputs.detach().float()
            # Rounding shifts each of C probabilities by at most half a unit in the last place.
            tolerance = max(1e-3, outputs.shape[2] ** 0.5 * torch.finfo(outputs.dtype).eps)
            sums_to_one = ((found.sum(2) - 1).abs() < tolerance).all() and ((found >= 0) & (found <= 1)).all()
            if bool(sums_to_one):
                raise InputError(
                    "The network returned probabilities (every row lies in [0, 1] and sums to 1) instead of logits. Pass "
                    '`output="probs"`, or return the logits.'
                )


@dataclass(frozen=True)
class Classification(ClassTask):
    """One class per input: logits [Z, B, C] and labels [B].

    The loss is the cross-entropy, with label smoothing and class weights as in ``torch.nn.functional.cross_entropy``:
    the batch's loss is divided by the sum of its labels' weights. Targets may also be probabilities [B, C], as from Mixup and
    CutMix; metrics that are not defined for them are skipped.

    Args:
        num_classes: C. If given, the output is checked against it; None takes it from the network's output.
        loss: ``"cross_entropy"``, or ``"focal"``, the cross-entropy times (1 - p_y)^gamma (Lin et al., arXiv 1708.02002).
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.
        class_weights: One weight per class.
        focal_gamma: Exponent of the focal loss, at least 0.

    Raises:
        InputError: A field is out of range.

    Example:
        >>> task = Classification(num_classes=3)
        >>> task.predict(torch.zeros(5, 2, 3)).probs.shape
        torch.Size([2, 3])
        >>> task.sample_losses(torch.zeros(2, 3), torch.tensor([0, 1]))
        (tensor([1.0986, 1.0986]), tensor([1., 1.]))
    """

    num_classes: int | None = None
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    focal_gamma: float = 2.0

    ood_score: ClassVar[str] = "predictive_entropy"
    score_names: ClassVar[tuple[str, ...]] = CategoricalPrediction.score_names
    takes_probabilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)
        check_choice("loss", self.loss, ("cross_entropy", "focal"))
        check_at_least("focal_gamma", self.focal_gamma, 0)
        if not _is_share(self.label_smoothing):
            raise InputError(f"`label_smoothing` must lie in [0, 1], but it is {self.label_smoothing!r}.")
        if self.loss == "focal" and self.label_smoothing:
            raise InputError(f"`label_smoothing` must be 0 with loss='focal', but it is {self.label_smoothing!r}.")
        object.__setattr__(self, "class_weights", checked_weights(self.class_weights, self.num_classes))

    def predict(self, outputs: Tensor) -> CategoricalPrediction:
        """A categorical prediction with one row of logits per hypothesis."""
        return CategoricalPrediction(outputs)

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of logits [B, C, ...]; the counts are the labels' weights, or 1 per soft target."""
        weight = weight_tensor(self.class_weights, output)
        if target.is_floating_point():
            return sums_and_counts(self._soft_losses(upcast(output), target, weight))
        ignored, logits, labels = self._ignored, self._counted_outputs(upcast(output), target), target.long()
        if is_short_row(logits, 1):
            # With a single map of labels, the classes are not in the last axis.
            logits, labels = logits.T.unsqueeze(0), labels.unsqueeze(0)
        losses = F.cross_entropy(
            logits,
            labels,
            weight,
            ignore_index=ignored,
            reduction="none",
            label_smoothing=self.label_smoothing,
        ).reshape(target.shape)
        if self.loss == "focal":
            losses = losses * self._focus(upcast(output), target, ignored)
        return sums_and_counts(losses, label_counts(target, weight, ignored, losses))

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for integer labels in [0, C), one per position of the output, or probabilities of the output's shape."""
        if not target.is_floating_point() or target.shape != outputs.shape[1:]:
            super().check_target(target, outputs, values=values)
        elif values and target.numel():
            gap = (upcast(target).sum(1) - 1).abs().amax()
            if bool((target < 0).any()) or not bool(gap < 1e-2):
                raise InputError(
                    "The targets have the shape of the logits, so they must be probabilities that sum to 1 for each input, but they "
                    "do not. If an input can have several labels, pass `task=Multilabel()`."
                )

    def _soft_losses(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The loss against probabilities [B, C, ...]."""
        target = (1 - self.label_smoothing) * target.to(output.dtype) + self.label_smoothing / output.shape[1]
        log_probs = torch.log_softmax(output, 1)
        # torch's cross-entropy is NaN if a class has probability 0 and target 0.
        each = -target * log_probs.where(target > 0, 0.0)
        if self.loss == "focal":
            each = each * self._focused(log_probs)
        return (each if weight is None else each * weight.reshape(-1, *[1] * (each.ndim - 2))).sum(1)

    def _focus(self, output: Tensor, target: Tensor, ignored: int) -> Tensor:
        """The factor (1 - p_y)^gamma of each label."""
        return self._focused(-F.cross_entropy(output, target.long(), ignore_index=ignored, reduction="none"))

    def _focused(self, log_probs: Tensor) -> Tensor:
        """The factor (1 - p)^gamma, with a finite gradient at p = 1."""
        return (-torch.expm1(log_probs)).clamp_min(torch.finfo(log_probs.dtype).tiny) ** self.focal_gamma

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Accuracy, NLL and ECE; for a test also the Brier score and the joint log-loss."""
        found = super().metrics(stage)
        return found if stage == "val" else {**found, "joint_log_loss": JointLogLoss(validate_args=False)}

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for logits [Z, B, C] with C >= 2 that are not probabilities."""
        self._check_classes(outputs, values)
        if outputs.ndim != 3:
            shape = outputs.shape[1:]
            may_be_last = len(shape) == 3 or shape[-1] < min(shape[1:-1])
            last = ", or `task=Segmentation(class_axis=-1)` if the last axis holds the classes" if may_be_last else ""
            raise OutputShapeError(
                f"The network returned {list(shape)}, a map of logits, but the task is Classification, one label per input. Pass "
                f"`task=Segmentation()`{last}, or a function that computes logits [B, C] as `output`."
            )

    def _counted_outputs(self, output: Tensor, target: Tensor) -> Tensor:
        return output

    @property
    def _ignored(self) -> int:
        return NO_LABEL


# ---------------------------------------------------------------------- shared by tasks with classes


def check_num_classes(num_classes: Any) -> None:
    """Raise an :class:`InputError` unless this is None or an integer of at least 2."""
    whole = isinstance(num_classes, numbers.Integral) and not isinstance(num_classes, bool)
    if num_classes is not None and (not whole or num_classes < 2):
        raise InputError(f"`num_classes` must be an integer of at least 2, or None, but it is {num_classes!r}.")


def _is_share(value: Any) -> bool:
    return isinstance(value, numbers.Real) and 0 <= float(value) <= 1


def check_ignore_index(ignore_index: Any) -> None:
    """Raise an :class:`InputError` unless this is None or an integer."""
    whole = isinstance(ignore_index, numbers.Integral) and not isinstance(ignore_index, bool)
    if ignore_index is not None and not whole:
        raise InputError(f"`ignore_index` must be an integer or None, but it is {ignore_index!r}.")


def checked_weights(weights: Any, num_classes: int | None) -> tuple[float, ...] | None:
    """Class weights as a tuple, so that a task stays plain data; raises an :class:`InputError` if they are unusable."""
    if weights is None:
        return None
    values = weights.tolist() if hasattr(weights, "tolist") else weights
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"`class_weights` must be numbers, one per class, but it is {weights!r}.") from error
    if not numbers or not all(math.isfinite(value) and value >= 0 for value in numbers) or not any(numbers):
        raise InputError(f"`class_weights` must be finite numbers of at least 0, not all 0, but it is {weights!r}.")
    if num_classes is not None and len(numbers) != num_classes:
        raise InputError(
            f"`class_weights` must hold {num_classes} numbers, one per class, but it holds {len(numbers)}."
        )
    return numbers


def weight_tensor(weights: Sequence[float] | None, output: Tensor) -> Tensor | None:
    """Class weights as a tensor for outputs [B, C, ...]."""
    if weights is None:
        return None
    if len(weights) != output.shape[1]:
        raise InputError(
            f"`class_weights` must hold {output.shape[1]} numbers, one per class of the network's output, but it holds "
            f"{len(weights)}."
        )
    return torch.tensor(weights, dtype=upcast(output).dtype, device=output.device)


def counted_outputs(output: Tensor, target: Tensor, ignored: int | None) -> Tensor:
    """Outputs [B, C, ...] with zeros at ignored positions, so that even NaN there reaches neither the loss nor the gradient."""
    return output if ignored is None else torch.where((target.long() != ignored).unsqueeze(1), output, 0.0)


def label_counts(target: Tensor, weight: Tensor | None, ignored: int, losses: Tensor) -> Tensor:
    """The weight of each label [B, ...]: its class's weight, or 1; 0 if the label is ignored."""
    kept = target.long() != ignored  # `ignored` would overflow in a narrow dtype
    if weight is None:
        return kept.to(losses.dtype)
    return torch.where(kept, weight[torch.where(kept, target, 0).long()], 0.0)


def _check_dtype(target: Tensor) -> None:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InputError(
            f"The targets must be integer class labels, but they are {target.dtype} of shape {list(target.shape)}. Pass another `task`: "
            "Multilabel() for several binary labels, Regression() for numbers."
        )


def _check_range(labels: Tensor, num_classes: int) -> None:
    if labels.numel():
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= num_classes:
            unlabelled = " Leave rows without a label out of the loader." if low < 0 else ""
            raise InputError(
                f"The targets must be class labels in [0, {num_classes}), but their values go from {low} to {high}.{unlabelled}"
            )
