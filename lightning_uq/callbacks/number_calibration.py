"""Checks and test metrics shared by the callbacks that calibrate predicted distributions of numbers."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.errors import InputError
from lightning_uq.metrics import CRPS, IntervalCoverage, RegressionNLL
from lightning_uq.predictions import NumberPrediction, Prediction
from lightning_uq.tasks import Task, describe


def check_state(who: str, name: str, tensors: dict[str, Any] | None) -> None:
    """Reject a fitted state without the callback's one tensor.

    Raises:
        InputError: The tensor is missing.
    """
    if tensors is not None and not isinstance(tensors.get(name), Tensor):
        raise InputError(f"The fitted state of {who} needs the tensor `{name}`, but it holds {sorted(tensors)}.")


def check_numeric(task: Task, who: str) -> None:
    """Reject a task without numbers.

    Raises:
        InputError: The task does not predict numbers.
    """
    if not task.has_numeric_targets:
        raise InputError(
            f"{who} calibrates predictions of numbers, which {describe(task)} does not make. Use TemperatureScaling for classes, or pass "
            "`task` if the targets are numbers."
        )


def check_numbers(prediction: Prediction) -> NumberPrediction:
    """The prediction, typed as one of numbers.

    Raises:
        InputError: The prediction is not of numbers.
    """
    if not isinstance(prediction, NumberPrediction):
        raise InputError(f"`prediction` must predict numbers, but it is a {type(prediction).__name__}.")
    return prediction


def check_rows(prediction: Prediction) -> NumberPrediction:
    """The prediction, typed as rows of numbers.

    Raises:
        InputError: The prediction is not of numbers, or holds maps.
    """
    numbers = check_numbers(prediction)
    if numbers.map_shape:
        raise InputError("`prediction` must hold one row per target, but it holds maps. Pass `prediction.as_rows()`.")
    return numbers


def check_known(values: Tensor, target: Tensor) -> None:
    """Reject values that are not finite, except a NaN where the target is missing.

    Raises:
        InputError: A prediction is NaN or infinite, or a target is infinite.
    """
    known = ~target.reshape(values.shape).isnan().to(values.device)
    if bool(target.isinf().any()) or not bool(torch.where(known, values, 0.0).isfinite().all()):
        raise InputError("`prediction` and `target` must be finite, except missing targets, which are NaN.")


def distribution_metrics(task: Task, when: When) -> dict[str, Metric]:
    """The task's test metrics of a distribution. For means, they are those of a Gaussian, only after the change."""
    own = {name: metric for name, metric in task.metrics("test").items() if name not in ("rmse", "mae")}
    if own or when == "":
        return own
    covered = IntervalCoverage(0.95, validate_args=False)
    return {"nll": RegressionNLL(validate_args=False), "crps": CRPS(validate_args=False), "coverage_95": covered}
