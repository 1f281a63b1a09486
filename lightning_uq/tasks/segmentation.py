"""One label per position of a map: pixels, voxels, tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.metrics import MeanIoU
from lightning_uq.predictions import CategoricalPrediction, ClassProbabilities
from lightning_uq.tasks.base import OutputShapeError, Progress, Stage
from lightning_uq.tasks.classification import Classification, ClassTask, check_ignore_index, counted_outputs


def counted_positions(target: Tensor, ignore_index: int | None) -> Tensor:
    """The positions [N] of the labels that count in a flat target."""
    labels = target.reshape(-1)
    if ignore_index is None:
        return torch.arange(len(labels), device=labels.device)
    return (labels.long() != ignore_index).nonzero().squeeze(1)  # the only step that waits for a GPU


def counted_rows(prediction: Any, target: Tensor, ignore_index: int | None) -> tuple[Any, Tensor]:
    """The positions that count in a map [B, C, *P], as rows [N, C] with labels [N]."""
    rows: ClassProbabilities = prediction.as_rows()
    labels = target.reshape(-1)
    if ignore_index is None:
        return rows, labels
    kept = counted_positions(target, ignore_index)
    return rows[kept], labels[kept]


def marked_labels(target: Tensor, ignore_index: int | None) -> Tensor:
    """Labels of any shape, with -1 for labels that do not count."""
    labels = target.long()
    return labels if ignore_index is None else torch.where(labels == ignore_index, -1, labels)


@dataclass(frozen=True)
class Segmentation(Classification):
    """One class per position of a map: logits [Z, B, C, *P] and labels [B, *P].

    P is one, two or three axes: tokens, pixels or voxels. Every position is a row: the loss is the mean over all positions of
    the batch that count, and the metrics count each of them once.

    Args:
        num_classes: C. If given, the output is checked against it; None takes it from the network's output.
        loss: ``"cross_entropy"`` or ``"focal"``.
        label_smoothing: Share of the target, in [0, 1], that is spread evenly over all classes.
        class_weights: One weight per class.
        ignore_index: The label of positions that do not count in the loss and in the metrics; None if all count.
        class_axis: The axis of the classes in the network's output: 1 for [B, C, *P], or -1 for [B, *P, C], as in the token
            classifiers of Hugging Face. Predictions always have the classes in axis 1.

    Raises:
        InputError: A field is out of range.

    Example:
        >>> import torch
        >>> task = Segmentation(ignore_index=255)
        >>> task.predict(torch.zeros(5, 2, 3, 8, 8)).label.shape
        torch.Size([2, 8, 8])
        >>> task.sample_losses(torch.zeros(2, 3, 2), torch.tensor([[0, 1], [2, 255]]))
        (tensor([2.1972, 1.0986]), tensor([2., 1.]))
        >>> Segmentation(class_axis=-1).predict(torch.zeros(1, 2, 7, 3)).probs.shape  # 7 tokens
        torch.Size([2, 3, 7])
    """

    ignore_index: int | None = None
    class_axis: Literal[1, -1] = 1

    has_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ignore_index(self.ignore_index)
        if self.class_axis not in (1, -1):
            raise InputError(
                f"`class_axis` must be 1 ([B, C, ...]) or -1 ([B, ..., C]), but it is {self.class_axis!r}."
            )

    @property
    def output_axis(self) -> int:
        """``class_axis``."""
        return self.class_axis

    @property
    def ignored_label(self) -> int | None:
        """``ignore_index``."""
        return self.ignore_index

    def predict(self, outputs: Tensor) -> CategoricalPrediction:
        """A categorical prediction with one map of logits per hypothesis."""
        return super().predict(self._classes_first(outputs, 2))

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The cross-entropy of logits [B, C, *P]; the counts are the weights of the labels that count."""
        return super().sample_losses(self._classes_first(output, 1), target, progress)

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Accuracy, NLL, ECE and mean IoU over the positions; for a test also the Brier score."""
        return {**ClassTask.metrics(self, stage), "miou": MeanIoU(validate_args=False)}

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The positions that count, as rows [N, C] with labels [N]."""
        return counted_rows(prediction, target, self.ignore_index)

    def sample_rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The whole maps, with label -1 at positions that do not count."""
        return prediction, marked_labels(target, self.ignore_index)

    def row_positions(self, target: Tensor) -> Tensor:
        """The positions of the labels that count."""
        return counted_positions(target, self.ignore_index)

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for logits [Z, B, C, *P] with C >= 2 that are not probabilities."""
        if outputs.ndim < 4:
            raise OutputShapeError(
                f"The network must return a map of logits [B, C, ...] for Segmentation, but it returned "
                f"{list(outputs.shape[1:])}. Pass `task=Classification()` for one label per input."
            )
        self._check_classes(self._classes_first(outputs, 2), values)

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for integer labels in [0, C) or ``ignore_index``, one per position of the output."""
        positions = self._classes_first(outputs, 2).shape[3:]
        if self.class_axis == 1 and target.shape[1:] != positions and target.shape == outputs.shape[1:-1]:
            raise InputError(
                f"The class labels have shape {list(target.shape)}, which fits outputs [B, ..., C] with the classes last, and the "
                f"network returns {list(outputs.shape[1:])}. Pass `task=Segmentation(class_axis=-1)`."
            )
        super().check_target(target, self._classes_first(outputs, 2), values=values)

    def invalid(self, outputs: Tensor) -> Tensor:
        """NaN, plus infinity, and positions with minus infinity for all classes."""
        return super().invalid(self._classes_first(outputs, 2))

    def _classes_first(self, outputs: Tensor, axis: int) -> Tensor:
        """Outputs with the classes in ``axis``, directly after the batch axis."""
        return outputs if self.class_axis == 1 else outputs.movedim(-1, axis)

    def _counted(self, target: Tensor) -> Tensor:
        return target if self.ignore_index is None else target[target.long() != self.ignore_index]

    def _counted_outputs(self, output: Tensor, target: Tensor) -> Tensor:
        return counted_outputs(output, target, self.ignore_index)

    @property
    def _ignored(self) -> int:
        return super()._ignored if self.ignore_index is None else self.ignore_index
