"""The meaning of a network's outputs: the one object that modules, callbacks, metrics and reports ask."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.predictions import Prediction

Stage = Literal["val", "test"]


class OutputShapeError(InputError):
    """A network's output has too few numbers for the task: one logit, or a mean without a variance."""


class Progress(NamedTuple):
    """How far a training is: what an annealed loss depends on.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs completed.
    """

    step: int
    epoch: int


class CalibrationRows(NamedTuple):
    """What a calibration is fitted to: one row per label that counts.

    Attributes:
        prediction: Predictions of classes with logits [Z, N, C], before any pooled calibration.
        labels: Class indices [N]; numbers where the targets are probabilities.
        group: Which of several labels a row belongs to [N]; None if there is one label per input or position.
        num_groups: How many labels there are.
    """

    prediction: Any
    labels: Tensor
    group: Tensor | None = None
    num_groups: int = 1


class Task(ABC):
    """The meaning of outputs [Z, B, ...]: their prediction, loss, metrics and checks.

    A task is plain data: a frozen dataclass whose fields a checkpoint and a YAML file can hold. It has no state. A module
    asks its task for everything that depends on the kind of output, so your own task is one file that subclasses this.

    Attributes:
        ood_score: The default out-of-distribution score, fixed before any such data is seen.
        score_names: The names that ``prediction.score(name)`` takes.
        metric_on_bar: The name of the validation metric that the progress bar shows beside the loss.
        has_classes: Whether each label is one of several classes.
        takes_calibration: Whether a calibration can be fitted, to :meth:`calibration_rows`.
        calibration_metrics: Names in ``metrics("test")`` that tell how good a calibration is.
        has_numeric_targets: Whether noise may be added to the targets.
        has_positions: Whether a prediction holds one result per position of a map, [B, ..., *P], rather than one per input.
        takes_probabilities: Whether a network may return probabilities or their logarithms instead of raw outputs.
        has_likelihood: Whether the loss is a negative log-density, as Bayesian inference needs it.
        needs_members: Whether all scores are spreads of several hypotheses, so that one network has none.
    """

    ood_score: ClassVar[str]
    score_names: ClassVar[tuple[str, ...]]
    metric_on_bar: ClassVar[str | None] = None
    has_classes: ClassVar[bool] = False
    takes_calibration: ClassVar[bool] = False
    calibration_metrics: ClassVar[tuple[str, ...]] = ("nll", "ece", "brier")
    has_numeric_targets: ClassVar[bool] = False
    has_positions: ClassVar[bool] = False
    takes_probabilities: ClassVar[bool] = False
    has_likelihood: ClassVar[bool] = True
    needs_members: ClassVar[bool] = False

    @property
    def num_outputs(self) -> int | None:
        """Size of the network's output axis where the fields say it, else None: the first output tells."""
        return None

    def outputs_for(self, num_targets: int) -> int:
        """Size of the output axis of a network for so many classes, labels or target dimensions."""
        return num_targets

    @property
    def output_axis(self) -> int:
        """The axis of one hypothesis's outputs [B, ...] whose size is :attr:`num_outputs`."""
        return 1

    @abstractmethod
    def predict(self, outputs: Tensor) -> Prediction:
        """The prediction that raw outputs [Z, B, ...] stand for."""

    @abstractmethod
    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample under one index, as a sum and the count that it is divided by.

        A module divides the batch's total sum by its total count, so that pixels that do not count, class weights and
        missing targets are all normalised in one way. A sample whose count is 0 adds nothing. Samples are independent: a
        module hands over the samples of several indices in one call.

        Args:
            output: Raw outputs [B, ...] of one index.
            target: Targets [B, ...].
            progress: How far the training is; None outside a training.

        Returns:
            The sums [B] and the counts [B].
        """

    @abstractmethod
    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """New metrics by name, logged as ``val_<name>`` or ``test_<name>`` beside the loss.

        They are the same on every rank before the first batch, so that a rank without a batch takes part in the same
        collectives. Each is updated with ``(prediction, target)`` as :meth:`rows` gives them; one with an attribute
        ``takes_index = True`` also gets ``index``, the samples' positions in the data set.
        """

    @abstractmethod
    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Raise an :class:`InputError` if outputs [Z, B, ...] cannot belong to this task.

        Args:
            outputs: Raw outputs [Z, B, ...].
            values: Whether to look at the values as well, which waits for a GPU: done at the first batch.
        """

    @abstractmethod
    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Raise an :class:`InputError` if a target does not fit outputs [Z, B, ...].

        Args:
            target: Targets [B, ...].
            outputs: Raw outputs [Z, B, ...].
            values: Whether to look at the values as well, which waits for a GPU.
        """

    def aligned(self, target: Tensor, output: Tensor) -> Tensor:
        """A checked target in the shape in which a loss of the user's own compares it with outputs [B, ...] of one index."""
        return target

    def accepts(self, target: Tensor) -> str | None:
        """Why this target cannot belong to the task, or None. Used for members' own data."""
        return None

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """A prediction and its target as the metrics count them: one row per label. Maps give one row per pixel."""
        return prediction, target

    def sample_rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """A prediction and its target with one row per input: maps stay whole, with a label of -1 where a position does not count."""
        return (prediction, target) if self.has_positions else self.rows(prediction, target)

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Scores [B, ...] of each input by name, which a comparison averages over the test rows; of your own task none.

        The names are those of ``lightning_uq.compare.statistics.measures``.

        Args:
            prediction: A prediction, as :meth:`predict` makes it.
            target: Its targets [B, ...].
        """
        return {}

    def row_positions(self, target: Tensor) -> Tensor | None:
        """The positions [N] in the flat target [B, ...] of the rows of :meth:`calibration_rows`; None if row b is sample b."""
        return None

    def calibration_rows(self, prediction: Any, target: Tensor) -> CalibrationRows:
        """The rows that a calibration is fitted to; asked of tasks that take one."""
        raise InputError(f"{describe(self)} has no probabilities that a calibration could be fitted to.")

    def invalid(self, outputs: Tensor) -> Tensor:
        """A mask of the numbers in outputs [Z, B, ...] that nothing can be predicted from, or of whole rows [Z, B, 1, ...]."""
        return ~outputs.isfinite()

    def logged(self, progress: Progress) -> Mapping[str, float]:
        """Further numbers to log at every training step."""
        return {}

    def review(self, metrics: Mapping[str, Any], progress: Progress | None) -> None:  # noqa: B027  # most tasks have nothing to say
        """Look at the metrics of a finished validation, and warn of what they show.

        Every rank is asked, with or without a batch, so that a review may gather.
        """


def describe(task: Task) -> str:
    """The task with the fields that differ from their defaults, for error messages: ``Segmentation(ignore_index=255)``.

    Example:
        >>> from lightning_uq.tasks import Segmentation
        >>> describe(Segmentation(ignore_index=255))
        'Segmentation(ignore_index=255)'
    """
    fields: Any = dataclasses.fields(task) if dataclasses.is_dataclass(task) else ()
    values = [(f.name, getattr(task, f.name)) for f in fields if getattr(task, f.name) != f.default]
    shown = [f"{name}={getattr(value, '__qualname__', None) or repr(value)}" for name, value in values]
    return f"{type(task).__name__}({', '.join(shown)})"


def sums_and_counts(losses: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums [B] and counts [B] of losses [B, ...], in at least float32; ``counts`` of the same shape, or None for one per loss.

    Example:
        >>> sums_and_counts(torch.ones(2, 3))
        (tensor([3., 3.]), tensor([3., 3.]))
    """
    losses = upcast(losses)
    counts = torch.ones_like(losses) if counts is None else counts
    if losses.ndim < 2:
        return losses, counts
    return losses.flatten(1).sum(1), counts.flatten(1).sum(1)
