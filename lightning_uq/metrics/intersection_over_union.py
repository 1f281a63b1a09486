"""The overlap of predicted and true regions over a data set."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.intersection_over_union import class_overlaps, intersection_over_union
from lightning_uq.functional.validation import check_floating, check_no_nan
from lightning_uq.metrics.base import HasProbs, UncertaintyMetric
from lightning_uq.metrics.scoring import log_probs_of

_STATES = ("classes", "intersections", "unions")


class MeanIoU(UncertaintyMetric):
    """Mean over the classes of the intersection over union of the predicted and the true region, pooled over the data set.

    Classes that are neither predicted nor among the labels are left out of the mean. The state is three integers per class,
    whatever the number of pixels. The number of classes need not be given, so a rank without a batch agrees with the others.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = MeanIoU()
        >>> metric.update(torch.tensor([[[0.9, 0.2], [0.1, 0.8]], [[0.1, 0.8], [0.9, 0.2]]]), torch.tensor([[0, 0], [1, 0]]))
        >>> metric.per_class()
        tensor([0.6667, 0.5000], dtype=torch.float64)
        >>> metric.compute()
        tensor(0.5833, dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    classes: list[Tensor]

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        for name in _STATES:
            self._add_rows(name, torch.int64)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities or logits [B, C, ...], or a prediction object.
            target: Class indices [B, ...].

        Raises:
            InputError: The shapes differ, a value is not a class index, or a probability is NaN.
        """
        scores = prediction if isinstance(prediction, Tensor) else log_probs_of(prediction)
        check_floating("prediction", scores, 2, "[B, C, ...]")
        if self.validate_args:
            check_no_nan("prediction", scores)
        label, num_classes = scores.argmax(1), scores.shape[1]
        overlaps = class_overlaps(label, target, num_classes, validate=self.validate_args)
        found = (torch.arange(num_classes, device=label.device), *overlaps)
        for name, rows in zip(_STATES, found, strict=True):
            self._append(name, rows)
        merged = self._by_class(max(len(part) for part in self.classes))
        for name, rows in zip(_STATES, merged, strict=True):
            setattr(self, name, [rows])

    def compute(self) -> Tensor:
        """The mean over the classes that occur; NaN if none does."""
        return self.per_class().nanmean()

    def per_class(self) -> Tensor:
        """IoU of each class [C]; NaN for a class that does not occur."""
        classes = self._rows("classes")
        _, intersections, unions = self._by_class(int(classes.amax()) + 1 if len(classes) else 0)
        return intersection_over_union(intersections, unions)

    def _by_class(self, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Classes [C], intersections [C] and unions [C] over all batches."""
        classes = self._rows("classes")
        zeros = torch.zeros(num_classes, dtype=torch.int64, device=classes.device)
        intersections, unions = (zeros.index_add(0, classes, self._rows(name)) for name in _STATES[1:])
        return torch.arange(num_classes, device=classes.device), intersections, unions
