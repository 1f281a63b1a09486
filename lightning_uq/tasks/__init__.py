"""Tasks: what a network's outputs mean, one file per task.

A module gets predictions, losses, metrics and checks from its task, so every method works with every task. In YAML a task is
one of the names in :data:`TASKS`, or a class path with arguments; in Python it is an instance.
"""

from lightning_uq.tasks.base import CalibrationRows, OutputShapeError, Progress, Stage, Task, describe, sums_and_counts
from lightning_uq.tasks.binary import Binary
from lightning_uq.tasks.categorical_regression import CategoricalRegression
from lightning_uq.tasks.classification import Classification, ClassTask
from lightning_uq.tasks.evidential_classification import EvidentialClassification
from lightning_uq.tasks.evidential_regression import EvidentialRegression
from lightning_uq.tasks.multilabel import Multilabel
from lightning_uq.tasks.names import TASKS, task_for, task_from_config, task_of, task_to_config
from lightning_uq.tasks.pixel_regression import PixelRegression
from lightning_uq.tasks.regression import Regression
from lightning_uq.tasks.regression_base import RegressionTask
from lightning_uq.tasks.segmentation import Segmentation

__all__ = [
    "TASKS",
    "Binary",
    "CalibrationRows",
    "CategoricalRegression",
    "ClassTask",
    "Classification",
    "EvidentialClassification",
    "EvidentialRegression",
    "Multilabel",
    "OutputShapeError",
    "PixelRegression",
    "Progress",
    "Regression",
    "RegressionTask",
    "Segmentation",
    "Stage",
    "Task",
    "describe",
    "sums_and_counts",
    "task_for",
    "task_from_config",
    "task_of",
    "task_to_config",
]
