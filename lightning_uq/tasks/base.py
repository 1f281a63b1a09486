"""The meaning of a network's outputs, in one object that modules, callbacks, metrics and reports share."""

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
    """Progress of a training, on which an annealed loss depends.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs completed.
    """

    step: int
    epoch: int


class CalibrationRows(NamedTuple):
    """The data that a calibration is fitted to: one row per label that counts.

    Attributes:
        prediction: Class predictions with logits [Z, N, C], before any pooled calibration.
        labels: Class indices [N]; floating-point numbers if the targets are probabilities.
        group: For several labels per input: which label each row belongs to [N]. None for one label per input or position.
        num_groups: Number of labels per input.
    """

    prediction: Any
    labels: Tensor
    group: Tensor | None = None
    num_groups: int = 1


class Task(ABC):
    """The meaning of outputs [Z, B, ...]: their prediction, loss, metrics and checks.

    A task is plain data: a frozen dataclass whose fields can be stored in a checkpoint and in a YAML file. It has no state. A
    module asks its task for everything that depends on the kind of output, so a task of your own is one file that subclasses this.

    Attributes:
        ood_score: The default out-of-distribution score, fixed before any such data is seen.
        score_names: The names that ``prediction.score(name)`` takes.
        metric_on_bar: The name of the validation metric that the progress bar shows beside the loss.
        has_classes: Whether each label is one of several classes.
        takes_calibration: Whether a calibration can be fitted, to :meth:`calibration_rows`.
        calibration_metrics: Names in ``metrics("test")`` that measure the quality of a calibration.
        has_numeric_targets: Whether noise may be added to the targets.
        has_positions: Whether a prediction has one result per position of a map, [B, ..., *P], rather than one per input.
        takes_probabilities: Whether a network may return probabilities or their logarithms instead of raw outputs.
        has_likelihood: Whether the loss is a negative log-density, as Bayesian inference requires.
        needs_members: Whether all scores measure the spread of several hypotheses, so that one network has none.
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
        """Size of the network's output axis if the fields determine it; None: the first output does."""
        return None

    def outputs_for(self, num_targets: int) -> int:
        """Size of a network's output axis for this number of classes, labels or target dimensions."""
        return num_targets

    @property
    def output_axis(self) -> int:
        """The axis of one hypothesis's outputs [B, ...] whose size is :attr:`num_outputs`."""
        return 1

    @property
    def ignored_label(self) -> int | None:
        """The label of positions or inputs that do not count; it may be the index of a class. None if every label counts."""
        return None

    @abstractmethod
    def predict(self, outputs: Tensor) -> Prediction:
        """The prediction for raw outputs [Z, B, ...]."""

    @abstractmethod
    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample under one index, as a sum and the count to divide it by.

        A module divides the batch's total sum by its total count. This normalises ignored pixels, class weights and missing
        targets in the same way. A sample whose count is 0 adds nothing. Samples must be independent, because a module passes the
        samples of several indices in one call.

        Args:
            output: Raw outputs [B, ...] of one index.
            target: Targets [B, ...].
            progress: The progress of the training; None outside a training.

        Returns:
            The sums [B] and the counts [B].
        """

    @abstractmethod
    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """New metrics by name, logged as ``val_<name>`` or ``test_<name>`` beside the loss.

        All ranks have the same metrics before the first batch, so that a rank without a batch takes part in the same
        collectives. Each metric is updated with ``(prediction, target)`` from :meth:`rows`; a metric with the attribute
        ``takes_index = True`` also gets ``index``, the samples' positions in the data set.
        """

    def check_kind(self, output: object) -> None:
        """Raise an :class:`InputError` for an argument ``output`` of ``"probs"`` or ``"log_probs"`` if the task needs raw outputs."""
        if output in ("probs", "log_probs") and not self.takes_probabilities:
            of_sigmoid = output == "probs" and not self.has_numeric_targets
            advice = "`torch.logit`, which undoes a sigmoid" if of_sigmoid else "a function that picks them"
            raise InputError(
                f"{describe(self)} needs the network's raw outputs, but argument `output` is {output!r}. Pass 'logits', or {advice}."
            )

    @abstractmethod
    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Raise an :class:`InputError` if outputs [Z, B, ...] cannot belong to this task.

        Args:
            outputs: Raw outputs [Z, B, ...].
            values: Whether to check the values as well, which waits for a GPU; the first batch does.
        """

    @abstractmethod
    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Raise an :class:`InputError` if a target does not fit outputs [Z, B, ...].

        Args:
            target: Targets [B, ...].
            outputs: Raw outputs [Z, B, ...].
            values: Whether to check the values as well, which waits for a GPU.
        """

    def aligned(self, target: Tensor, output: Tensor) -> Tensor:
        """A checked target in the shape in which a user's own loss compares it with outputs [B, ...] of one index."""
        return target

    def accepts(self, target: Tensor) -> str | None:
        """The reason why a target cannot belong to the task, or None. Used for the data of LightningModules as members."""
        return None

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """A prediction and its target as rows for the metrics: one row per label. Maps give one row per pixel."""
        return prediction, target

    def sample_rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """A prediction and its target with one row per input: maps stay whole, with label -1 at positions that do not count."""
        return (prediction, target) if self.has_positions else self.rows(prediction, target)

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Scores [B, ...] of each input by name, which a comparison averages over the test rows. The default is no scores.

        The names are those of ``lightning_uq.compare.statistics.measures``.

        Args:
            prediction: A prediction from :meth:`predict`.
            target: Its targets [B, ...].
        """
        return {}

    def row_positions(self, target: Tensor) -> Tensor | None:
        """The positions [N] in the flat target [B, ...] of the rows of :meth:`calibration_rows`; None if row b is sample b."""
        return None

    def calibration_rows(self, prediction: Any, target: Tensor) -> CalibrationRows:
        """The rows that a calibration is fitted to, for tasks with ``takes_calibration``."""
        raise InputError(f"{describe(self)} has no probabilities that a calibration could be fitted to.")

    def invalid(self, outputs: Tensor) -> Tensor:
        """A mask of unusable numbers in outputs [Z, B, ...], or of unusable rows [Z, B, 1, ...].

        Every finite number is usable, so it need not be called for outputs that are all finite.
        """
        return ~outputs.isfinite()

    def logged(self, progress: Progress) -> Mapping[str, float]:
        """Additional numbers to log at every training step."""
        return {}

    def review(self, metrics: Mapping[str, Any], progress: Progress | None) -> None:  # noqa: B027  # most tasks review nothing
        """Review the metrics of a finished validation, and warn of problems that they show.

        It is called on every rank, even without a batch, so it may gather.
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
    """Sums [B] and counts [B] of losses [B, ...], in at least float32. ``counts`` has the losses' shape; None counts each loss once.

    Example:
        >>> sums_and_counts(torch.ones(2, 3))
        (tensor([3., 3.]), tensor([3., 3.]))
    """
    losses = upcast(losses)
    counts = torch.ones_like(losses) if counts is None else counts
    if losses.ndim < 2:
        return losses, counts
    return losses.flatten(1).sum(1), counts.flatten(1).sum(1)
