"""Metrics of predictions that are answered only if they are confident enough."""

from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_shape
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.predictions import ClassProbabilities


class AnsweredShare(MeanMetric):
    """Share of rows that are answered, in [0, 1].

    Args:
        validate_args: As in all metrics; it has no effect here, because the values are not used.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> prediction = CategoricalPrediction(torch.zeros(1, 2, 3)).replace(answered=torch.tensor([True, False]))
        >>> metric = AnsweredShare()
        >>> metric.update(prediction, torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("answered", validate_args=validate_args, **kwargs)

    def update(self, prediction: ClassProbabilities, target: Tensor) -> None:
        """Add a batch of predictions that carry ``answered`` [B]; only the shape of the target is read.

        Raises:
            NotFittedError: The predictions carry no ``answered``.
        """
        self._add(answered_rows(prediction, target))


class SelectiveError(MeanMetric):
    """Error rate among the answered rows, in [0, 1]; NaN if no row is answered.

    Args:
        validate_args: As in all metrics; it has no effect here, because the values are not used.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> prediction = CategoricalPrediction(torch.tensor([[[2.0, 0.0], [0.0, 0.1]]]))
        >>> metric = SelectiveError()
        >>> metric.update(prediction.replace(answered=torch.tensor([True, False])), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("wrong", validate_args=validate_args, **kwargs)

    def update(self, prediction: ClassProbabilities, target: Tensor) -> None:
        """Add a batch of predictions that carry ``answered`` [B].

        Args:
            prediction: The predictions.
            target: Class indices [B].

        Raises:
            NotFittedError: The predictions carry no ``answered``.
        """
        answered = answered_rows(prediction, target)
        self._add(prediction.label != target.to(answered.device), answered)


def answered_rows(prediction: object, target: Tensor) -> Tensor:
    """Whether each row is answered, bool [B].

    Raises:
        InputError: The prediction is not one of classes, or the target has another shape.
        NotFittedError: The prediction carries no ``answered``.
    """
    if not isinstance(prediction, ClassProbabilities):
        raise InputError(f"`prediction` must be a prediction of classes, but it is a {type(prediction).__name__}.")
    check_shape("target", target, prediction.answered.shape)
    return prediction.answered
