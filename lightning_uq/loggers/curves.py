"""The sums over a stream of predictions that a figure needs; their size does not grow with the number of rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration import calibration_error
from lightning_uq.functional.precision import widen
from lightning_uq.loggers.drawing import coverage_figure, reliability_figure
from lightning_uq.metrics import ExpectedCalibrationError, IntervalCoverage, LabelCalibrationError
from lightning_uq.running.metrics import update_all
from lightning_uq.tasks import Task, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

Sums = Mapping[float, Tensor]
"""Sums of one process, by a key that is the same on all ranks."""


class Curve(ABC):
    """Sums over predictions and targets, and the figure that they give."""

    name: ClassVar[str]
    """What the figure is called."""

    @abstractmethod
    def add(self, task: Task, prediction: Any, target: Tensor) -> None:
        """Add the rows of a batch.

        Raises:
            InputError: The prediction does not have what the figure shows.
        """

    @abstractmethod
    def sums(self) -> Sums:
        """The sums so far, on the CPU."""

    @classmethod
    @abstractmethod
    def figure(cls, sums: Sums, title: str) -> "Figure":
        """The figure of sums, which may be those of several processes."""


class Reliability(Curve):
    """Bins of the confidence in a class, or of the probabilities of labels.

    Args:
        metric: The task's own calibration error, which has ``statistics()``.
        device: Where predictions are.
    """

    name = "reliability"

    def __init__(self, metric: ExpectedCalibrationError | LabelCalibrationError, device: torch.device) -> None:
        self.metric = metric.to(device)

    def add(self, task: Task, prediction: Any, target: Tensor) -> None:
        """Bin the batch's probabilities."""
        metrics: dict[str, Metric] = {"ece": self.metric}
        update_all(metrics, task, prediction, target)

    def sums(self) -> Sums:
        """The bins [3, num_bins] of all labels together."""
        return {0.0: self.metric.statistics().sum(1).cpu()}

    @classmethod
    def figure(cls, sums: Sums, title: str) -> "Figure":
        """The reliability diagram."""
        bins = sums[0.0]
        return reliability_figure(bins, title=title, note=f"ECE {float(calibration_error(bins)):.3f}")


class Coverage(Curve):
    """How many targets lie in the central intervals of several levels.

    Args:
        levels: The levels. Predictions of quantiles lack those beyond their outermost ones.
    """

    name = "coverage"

    def __init__(self, levels: tuple[float, ...] = LEVELS) -> None:
        self.levels = levels
        self._sums: dict[float, Tensor] = {}

    def add(self, task: Task, prediction: Any, target: Tensor) -> None:
        """Count the covered targets of the batch."""
        prediction, target = task.rows(prediction, target)
        known = ~target.isnan()
        last_error: InputError | None = None
        for level in self.levels:
            try:
                covered = prediction.covered(target, level)
            except InputError as error:
                last_error = error
                continue
            counted = widen(torch.stack([(covered & known).sum(), known.sum()]))
            self._sums[level] = self._sums[level] + counted if level in self._sums else counted
        if last_error is not None and not self._sums:
            raise last_error

    def sums(self) -> Sums:
        """Numbers of covered and of known targets [2] by level."""
        return {level: counted.cpu() for level, counted in self._sums.items()}

    @classmethod
    def figure(cls, sums: Sums, title: str) -> "Figure":
        """Observed coverage against the level."""
        levels = sorted(sums)
        covered, known = torch.stack([sums[level] for level in levels]).T
        return coverage_figure(
            covered / known, torch.tensor(levels, dtype=torch.float64), num_rows=int(known[0]), title=title
        )


def make_curve(task: Task, num_bins: int, device: torch.device) -> Curve:
    """An empty curve for the predictions of a task.

    Raises:
        InputError: The predictions have neither class probabilities nor intervals.
    """
    found = task.metrics("test").values()
    for metric in found:
        if isinstance(metric, ExpectedCalibrationError | LabelCalibrationError):
            return Reliability(type(metric)(num_bins=num_bins, validate_args=False), device)
    own = [metric.level for metric in found if isinstance(metric, IntervalCoverage)]
    if not own:
        raise InputError(f"{describe(task)} predicts neither class probabilities nor intervals.")
    return Coverage(tuple(sorted({*LEVELS, *own})))
