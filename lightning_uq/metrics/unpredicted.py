"""Classes that a classifier never predicts."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.validation import check_floating, check_no_nan, check_target
from lightning_uq.metrics.base import HasProbs, UncertaintyMetric, get_probs

_MOST_ROWS = 16_384
"""Above this number of rows, duplicate labels are dropped. That waits for the device, so it is not done after every batch."""


class UnpredictedClasses(UncertaintyMetric):
    """Number of classes that occur among the labels but are never predicted.

    The state holds labels; if there are many, each class is kept once. The number of classes need not be given, so a rank without
    rows agrees with the others.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = UnpredictedClasses()
        >>> metric.update(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([1]))
        >>> metric.compute(), metric.classes()
        (tensor(1), [1])
    """

    higher_is_better: bool | None = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows("labelled", torch.int64)
        self._add_rows("predicted", torch.int64)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities [B, C, ...], or a prediction object.
            target: Class indices [B, ...].

        Raises:
            InputError: The shapes differ, the targets are not integers, or a probability is NaN.
        """
        label = getattr(prediction, "label", None)
        if not isinstance(label, Tensor):
            probs = prediction if isinstance(prediction, Tensor) else get_probs(prediction)
            check_floating("prediction", probs, 2, "[B, C, ...]")
            if self.validate_args:
                check_no_nan("prediction", probs)
            label = probs.argmax(1)
        check_target(target, label.shape)
        for name, seen in (("labelled", target), ("predicted", label)):
            self._append(name, seen.reshape(-1))
            if sum(len(rows) for rows in getattr(self, name)) > _MOST_ROWS:
                setattr(self, name, [torch.unique(self._rows(name))])

    def compute(self) -> Tensor:
        """The number of such classes."""
        return torch.tensor(len(self._missing()), device=self.device)

    def classes(self) -> list[int]:
        """These classes, over all ranks. Collective: call it on all ranks."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not self._is_synced):
            return self._missing()

    def _missing(self) -> list[int]:
        return sorted({*self._rows("labelled").tolist()} - {*self._rows("predicted").tolist()})
