"""Tasks by name, for YAML and short calls, and as plain data, for files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_uq.checkpoint_files import plain_part
from lightning_uq.data.interface import TaskData
from lightning_uq.errors import InputError, without_period
from lightning_uq.tasks.base import Task
from lightning_uq.tasks.binary import Binary
from lightning_uq.tasks.categorical_regression import CategoricalRegression
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
"""The tasks by their names in strings; each is built with its defaults."""


_UNSUPPORTED = {
    "counts": ("count", "counts", "poisson"),
    "ordered classes": ("ordinal",),
    "times of events": ("survival", "cox", "time_to_event"),
}


def task_of(value: Any) -> Task:
    """A task itself, or the task that a string names.

    Raises:
        InputError: The value is neither a task nor the name of one.

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
                "'classification' or 'regression' if that describes the targets well."
            )
    raise InputError(f"`task` must be a Task, or one of {', '.join(map(repr, TASKS))}, but it is {value!r}.")


def task_for(data: TaskData) -> Task:
    """The task for a data module's targets, with the fields that the data determine.

    Returns:
        ``Classification(num_classes=...)``, ``Binary()``, ``Multilabel(num_labels=...)``, ``Segmentation(num_classes=...,
        ignore_index=...)`` or ``Regression(target_scale=...)``, with defaults for all other fields.

    Example:
        >>> from lightning_uq.data import DigitsDataModule
        >>> task_for(DigitsDataModule()).num_classes
        8
    """
    return TASKS[data.task](**data.task_arguments)


_OF_THIS_PACKAGE: dict[str, type[Task]] = {
    **{kind.__name__: kind for kind in TASKS.values()},
    "CategoricalRegression": CategoricalRegression,
}


def task_to_config(task: Task) -> dict[str, Any] | None:
    """A task as plain data, from which :func:`task_from_config` builds it. None for a task of your own, or if a field is a function.

    Example:
        >>> task_to_config(Multilabel(num_labels=3))["init_args"]["num_labels"]
        3
    """
    name = type(task).__name__
    if _OF_THIS_PACKAGE.get(name) is not type(task):
        return None
    given = {one.name: getattr(task, one.name) for one in dataclasses.fields(task) if one.init}  # type: ignore[arg-type]  # all are dataclasses
    plain, left_out = plain_part(given)
    return None if left_out else {"name": name, "init_args": plain}


def task_from_config(config: Mapping[str, Any]) -> Task:
    """Build a task from the output of :func:`task_to_config`.

    Raises:
        InputError: This version has no such task, or it takes other arguments.

    Example:
        >>> task_from_config({"name": "Multilabel", "init_args": {"num_labels": 3}})
        Multilabel(num_labels=3, ignore_index=None, loss='bce', pos_weight=None, label_smoothing=0.0, focal_gamma=2.0)
    """
    try:
        return _OF_THIS_PACKAGE[config["name"]](**config["init_args"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"This version of lightning_uq cannot build the task {dict(config)}: {without_period(error)}."
        ) from error
