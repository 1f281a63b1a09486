"""Tasks by name, for YAML and for short calls."""

from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.tasks.base import Task
from lightning_uq.tasks.classification import Classification
from lightning_uq.tasks.evidential_classification import EvidentialClassification
from lightning_uq.tasks.evidential_regression import EvidentialRegression
from lightning_uq.tasks.regression import Regression
from lightning_uq.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "regression": Regression,
    "evidential_classification": EvidentialClassification,
    "evidential_regression": EvidentialRegression,
}
"""The tasks that a plain string names; each is built with its defaults."""


def task_of(value: Any) -> Task:
    """The task itself, or the one that a string names.

    Raises:
        InputError: It is neither.

    Example:
        >>> task_of("evidential_regression").ood_score
        'epistemic_variance'
    """
    if isinstance(value, Task):
        return value
    if isinstance(value, str) and value in TASKS:
        return TASKS[value]()
    raise InputError(f"`task` must be a Task, or one of {', '.join(map(repr, TASKS))}, but it is {value!r}.")
