"""One label per position of a map: pixels, voxels, tokens."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_uq.predictions import ClassProbabilities
from lightning_uq.tasks.base import OutputShapeError, Stage
from lightning_uq.tasks.classification import Classification, ClassTask, check_ignore_index, counted_outputs


def counted_rows(prediction: Any, target: Tensor, ignore_index: int | None) -> tuple[Any, Tensor]:
    """The positions of a map [B, C, *P] that count, as rows [N, C] with labels [N]."""
    rows: ClassProbabilities = prediction.as_rows()
    labels = target.reshape(-1)
    if ignore_index is None:
        return rows, labels
    kept = (labels.long() != ignore_index).nonzero().squeeze(1)  # the one look that waits for a GPU
    return rows[kept], labels[kept]


@dataclass(frozen=True)
class Segmentation(Classification):
    """One class per position of a map: logits [Z, B, C, *P] and labels [B, *P], P one, two or three axes.

    Every position is a row: the loss is the mean over all positions of the batch that count, and the metrics count each of
    them once.

    Args:
        num_classes: C. None takes it from the network's output; given, the output is checked against it.
        loss: ``"cross_entropy"``.
        label_smoothing: Share of the target that is spread evenly over all classes, in [0, 1].
        class_weights: One weight per class.
        ignore_index: The label of positions that do not count, in the loss and in the metrics; None if all of them count.

    Raises:
        InputError: A field is out of range.

    Example:
        >>> import torch
        >>> task = Segmentation(ignore_index=255)
        >>> task.predict(torch.zeros(5, 2, 3, 8, 8)).label.shape
        torch.Size([2, 8, 8])
        >>> task.sample_losses(torch.zeros(2, 3, 2), torch.tensor([[0, 1], [2, 255]]))
        (tensor([2.1972, 1.0986]), tensor([2., 1.]))
    """

    ignore_index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ignore_index(self.ignore_index)

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Accuracy, NLL and ECE of the positions; in a test the Brier score as well."""
        return ClassTask.metrics(self, stage)

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The positions that count, as rows [N, C] with labels [N]."""
        return counted_rows(prediction, target, self.ignore_index)

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Logits [Z, B, C, *P] with C >= 2 that are no probabilities."""
        self._check_classes(outputs, values)
        if outputs.ndim < 4:
            raise OutputShapeError(
                f"The network must return a map of logits [B, C, ...] for Segmentation, but it returned "
                f"{list(outputs.shape[1:])}. Pass `task=Classification()` for one label per input."
            )

    def _counted(self, target: Tensor) -> Tensor:
        return target if self.ignore_index is None else target[target.long() != self.ignore_index]

    def _counted_outputs(self, output: Tensor, target: Tensor) -> Tensor:
        return counted_outputs(output, target, self.ignore_index)

    @property
    def _ignored(self) -> int:
        return super()._ignored if self.ignore_index is None else self.ignore_index
