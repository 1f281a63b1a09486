"""Tasks by name, for YAML and for short calls."""

from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.tasks.base import Task
from lightning_uq.tasks.binary import Binary
from lightning_uq.tasks.classification import Classification
from lightning_uq.tasks.evidential_classification import EvidentialClassification
from lightning_uq.tasks.evidential_regression import EvidentialRegression
from lightning_uq.tasks.multilabel import Multilabel
from lightning_uq.tasks.pixel_regression import PixelRegression
from lightning_uq.tasks.regression import Regression
from lightning_uq.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "binary": Binary,
    "multilabel": Multilabel,
    "segmentation": Segmentation,
    "regression": Regression,
    "pixel_regression": PixelRegression,
    "evidential_classification": EvidentialClassification,
    "evidential_regression": EvidentialRegression,
}
"""The tasks that a plain string names; each is built with its defaults."""


_UNSUPPORTED = {
    "counts": ("count", "counts", "poisson"),
    "ordered classes": ("ordinal",),
    "times of events": ("survival", "cox", "time_to_event"),
}


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
    for kind, names in _UNSUPPORTED.items():
        if isinstance(value, str) and value.lower() in names:
            raise InputError(
                f"`task` {value!r} is not supported: no task here has a likelihood of {kind}. Subclass Task with your own, or use "
                "'classification' or 'regression' if that is a fair description of the targets."
            )
    raise InputError(f"`task` must be a Task, or one of {', '.join(map(repr, TASKS))}, but it is {value!r}.")
