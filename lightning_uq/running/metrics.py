"""Metrics of a task, updated with a batch's prediction."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_uq.predictions import Prediction
from lightning_uq.tasks import Task


def update_all(
    metrics: Mapping[str, Metric],
    task: Task,
    prediction: Prediction,
    target: Tensor,
    index: Tensor | None = None,
    per_sample: bool = False,
) -> None:
    """Update each of a task's metrics with a prediction and its target.

    Args:
        metrics: Metrics by name, of ``task.metrics``.
        task: The task.
        prediction: The prediction of the batch.
        target: Its target, checked.
        index: The samples' positions in the data set, if known.
        per_sample: Whether the metrics get whole maps rather than their positions.
    """
    prediction, target = (task.sample_rows if per_sample else task.rows)(prediction, target)
    if not len(target):
        return
    is_soft = task.has_classes and target.is_floating_point()
    for metric in metrics.values():
        if is_soft and not getattr(metric, "takes_soft_targets", False):
            # Undefined for targets that are probabilities: a metric without rows is NaN.
            _update(metric, prediction[:0], target[:0].argmax(1), None if index is None else index[:0])
        else:
            _update(metric, prediction, target, index)


def _update(metric: Metric, prediction: Any, target: Tensor, index: Tensor | None) -> None:
    if getattr(metric, "takes_index", False):
        metric.update(prediction, target, index)
    else:
        metric.update(prediction, target)
