"""The share of inputs that raise an alarm."""

from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.predictions import Prediction


class OODAlarmRate(MeanMetric):
    """Share of inputs with an ``ood_alarm``, in [0, 1]. In distribution, it is about :class:`~lightning_uq.OODAlarm`'s ``false_alarm_rate``.

    Args:
        validate_args: As in all metrics; it has no effect here, because the values are not used.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> prediction = CategoricalPrediction(torch.zeros(1, 2, 3)).replace(ood_alarm=torch.tensor([True, False]))
        >>> metric = OODAlarmRate()
        >>> metric.update(prediction)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("alarms", validate_args=validate_args, **kwargs)

    def update(self, prediction: Prediction, target: Tensor | None = None) -> None:
        """Add a batch of predictions that carry ``ood_alarm`` [B]; only the target's number of rows is checked.

        Raises:
            InputError: The argument is not a prediction, or the target has another number of rows.
            NotFittedError: The prediction carries no ``ood_alarm``.
        """
        if not isinstance(prediction, Prediction):
            raise InputError(
                f"`prediction` must be a prediction of this package, but it is a {type(prediction).__name__}."
            )
        if target is not None and len(target) != len(prediction):
            raise InputError(
                f"`target` must have {len(prediction)} rows like the prediction, but it has {len(target)}."
            )
        self._add(prediction.ood_alarm)
