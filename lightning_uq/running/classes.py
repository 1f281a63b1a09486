"""Reads labels and logits from any model's batches, for fits after training."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import mean_log_probs
from lightning_uq.functional.precision import widen
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.ranks import gather_rows
from lightning_uq.running.row_sample import MAX_ROWS, RowSample, keys_of
from lightning_uq.tasks import Task, describe

_PART_ELEMENTS = 2**17  # logits in float64 per part


def labelled_batch(
    reader: LogitReader, model: nn.Module, batch: Any, outputs: Tensor, where: str, *, values: bool = True
) -> Tensor:
    """The target of a batch, checked by the task.

    Args:
        reader: Reader of the model's batches.
        model: The model.
        batch: The batch.
        outputs: Its outputs [Z, B, ...].
        where: What the batch belongs to; it begins the error message.
        values: Whether to check the values too, which waits for the GPU.

    Raises:
        InputError: There is no target, or it does not match the outputs.
    """
    target = target_of(reader, model, batch, where)
    check_targets(reader, model, target, outputs, where, values=values)
    return target


def check_targets(
    reader: LogitReader, model: nn.Module, target: Tensor, outputs: Tensor, where: str, *, values: bool = True
) -> None:
    """Reject targets [N, ...] that do not match the task of a model with outputs [Z, N, ...]; ``where`` begins the message.

    Raises:
        InputError: The targets do not match, or contradict those from which the task was inferred.
    """
    reader.check_inferred_task(model, target)
    task = reader.task(model)
    try:
        task.check_target(target, outputs, values=values)
    except InputError as error:
        raise InputError(f"{where[0].upper()}{where[1:]} does not fit {describe(task)}. {error}") from error


def target_of(reader: LogitReader, model: nn.Module, batch: Any, where: str) -> Tensor:
    """The target of a batch.

    Raises:
        InputError: There is no target; ``where`` begins the message.
    """
    _, target = reader.unpack(model, batch)
    if not isinstance(target, Tensor):
        came = "none" if target is None else f"targets of {type(target).__name__}"
        raise InputError(
            f"{where[0].upper()}{where[1:]} must have targets, but a batch has {came}. Pass argument `unpack_batch`, or a loader "
            "of `(x, y)`."
        )
    return target


def density_labels(
    reader: LogitReader, model: nn.Module, batch: Any, where: str, trainer: Trainer | None = None
) -> Tensor | None:
    """Class labels [B] of a batch without its outputs; None if the task has no classes.

    Raises:
        InputError: The batch has none, although the task has classes; ``where`` begins the message.
    """
    reader.look_at_task(model, batch, trainer)
    task = reader.task(model)
    if not task.has_classes:
        return None
    try:
        target = target_of(reader, model, batch, where)
    except InputError as error:
        raise InputError(f"{error} `FitGMM(num_components=1)` needs no labels.") from error
    reason = task.accepts(target)
    if reason is not None:
        is_whole = not (target.is_floating_point() or target.dtype == torch.bool or target.is_complex())
        span = f" from {int(target.min())} to {int(target.max())}" if is_whole and target.numel() else ""
        advice = (
            "Remove rows without a label."
            if span and bool((target < 0).any())
            else "Pass argument `unpack_batch`, a loader of `(x, y)`, or the `task` of these targets. `FitGMM(num_components=1)` needs no "
            "labels."
        )
        raise InputError(
            f"{where[0].upper()}{where[1:]} must hold class labels, but a batch has targets of {target.dtype}{span}. {advice}"
        )
    return (target.squeeze(1) if target.shape[1:] == (1,) and not task.has_positions else target).long()


class FittingRows(NamedTuple):
    """The rows of all ranks to which a calibration is fitted.

    Attributes:
        logits: Logits [Z, N, C] on the CPU, in the precision of the predictions, at least float32.
        labels: Class indices [N].
        group: The index of each row's label among the labels of its input [N]; 0 if there is one label.
        num_groups: L, the number of labels per input.
    """

    logits: Tensor
    labels: Tensor
    group: Tensor
    num_groups: int

    def parts(self) -> Iterator["FittingRows"]:
        """Parts of the rows, with logits in float64."""
        size = max(1, _PART_ELEMENTS // self.logits[:, :1].numel())
        parts = (torch.split(self.logits, size, 1), torch.split(self.labels, size), torch.split(self.group, size))
        for logits, labels, group in zip(*parts, strict=True):
            yield FittingRows(logits.double(), labels, group, self.num_groups)


class CalibrationReader:
    """Reads the data for a calibration: logits and labels, one row per counted label, or a sample of these rows.

    The logits are those of the members; for a Dirichlet, the log of its mean. Rows are stored in the precision of the predictions, at least
    float32; fits are computed in float64.

    Args:
        reader: Reader of the model's outputs.
        who: Name of the calibrating callback, for messages.
        where: What the batches belong to; it begins messages.
        of_members: Whether to read the logits of the members, rather than the log of their mean probabilities with Z = 1.
        max_rows: See :class:`~lightning_uq.running.row_sample.RowSample`.

    Attributes:
        rows: The rows so far.
        num_read: Number of samples read.
        num_groups: L, the number of labels per input; 1 if there is one.
    """

    def __init__(
        self,
        reader: LogitReader,
        who: str,
        where: str,
        *,
        of_members: bool = False,
        max_rows: int | None = MAX_ROWS,
    ) -> None:
        self.reader = reader
        self.who = who
        self.where = where
        self.of_members = of_members
        self.rows = RowSample(max_rows)
        self.num_read = 0
        self.num_groups = 0

    def add(
        self,
        model: nn.Module,
        batch: Any,
        trainer: Trainer | None,
        positions: Callable[[int], tuple[Tensor | None, Tensor | None]] = lambda num: (None, None),
    ) -> None:
        """Add the rows of a batch.

        Args:
            model: The model.
            batch: The batch.
            trainer: The Trainer, if there is one.
            positions: ``positions(B)`` returns the positions [B] of a batch's samples in the data set, and the mask of those that
                count. None: the positions that :func:`~lightning_uq.running.loaders.exact_loader` reads, and all count.

        Raises:
            InputError: The model does not predict classes, its batch has no labels, or the logits of members are needed
                (``of_members``) but the predictions have none.
        """
        is_first = self.num_read == 0
        self.reader.look_at_task(model, batch, trainer, is_first=is_first)
        task = self.reader.task(model)
        check_calibration(task, self.who)
        outputs = self.reader(model, batch, trainer, check=is_first)
        target = labelled_batch(self.reader, model, batch, outputs, self.where)
        numbers, keep = positions(len(target))
        if numbers is None:
            rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
            numbers = rank + world * torch.arange(self.num_read, self.num_read + len(target))
        self.num_read += len(target)
        if keep is not None:
            outputs, target = outputs[:, keep.to(outputs.device)], target[keep.to(target.device)]
            numbers = numbers[keep]
        raw = self.reader.prediction(model, outputs, to_members=False)
        prediction, labels, group, self.num_groups = task.calibration_rows(raw, target)
        if labels.is_floating_point():
            raise InputError(
                f"{self.where[0].upper()}{self.where[1:]} must have labels, but the targets of a batch are probabilities. Pass a loader "
                "without label mixing or smoothing."
            )
        self.keep(keys_of(task, target, numbers), prediction, labels, group)

    def keep(self, keys: Tensor, prediction: Any, labels: Tensor, group: Tensor | None) -> None:
        """Store the rows of a batch: the key, the prediction, the label and the group [N] of each."""
        if group is not None:
            labels = 2 * group + labels  # one number for the sample
        chosen = self.rows.choose(keys)
        # Rows first, so that they can be gathered.
        raw = prediction[chosen]
        kept_as = torch.promote_types(raw.dtype, torch.float32)
        logits = self.logits_of(raw).to(kept_as).transpose(0, 1)
        chosen_labels = labels[chosen.to(labels.device) if isinstance(chosen, Tensor) else chosen]
        self.rows.add(keys[chosen], logits, chosen_labels.long())

    def logits_of(self, prediction: Any) -> Tensor:
        """The logits [Z, N, C] to fit, in float64 if the device supports it."""
        if self.of_members:
            return widen(prediction.logits)
        return mean_log_probs(widen(prediction.calibration_logits)).unsqueeze(0)

    def gather(self, trainer: Trainer | None) -> FittingRows:
        """The rows of all ranks, or of this process if ``trainer`` is None. A collective.

        Raises:
            InputError: There are no rows.
        """
        found = [rows.cpu() for rows in self.rows.gather(trainer, self.who)]
        self.check_not_empty(len(found))
        logits, labels = found
        self.check_not_empty(len(labels))
        num_groups = self.num_groups_of_ranks(trainer)
        several = num_groups > 1
        group = labels // 2 if several else torch.zeros_like(labels)
        return FittingRows(logits.transpose(0, 1), labels % 2 if several else labels, group, num_groups)

    def num_groups_of_ranks(self, trainer: Trainer | None) -> int:
        """L, shared with ranks without data. A collective."""
        if trainer is None or trainer.world_size == 1:
            return self.num_groups
        return int(gather_rows(torch.tensor([self.num_groups], device=trainer.strategy.root_device), trainer).max())

    def check_not_empty(self, num_rows: int) -> None:
        """Raise an :class:`InputError` if no rank has a row."""
        if not num_rows:
            raise InputError(f"{self.where[0].upper()}{self.where[1:]} are empty.")


def check_calibration(task: Task, who: str, needs_classes: bool = False) -> None:
    """Raise an :class:`InputError` for a task that does not predict probabilities, or, with ``needs_classes``, classes."""
    if not task.takes_calibration:
        raise InputError(
            f"{who} calibrates probabilities, which {describe(task)} does not predict. Leave it out of the callbacks, or pass `task` "
            "if the outputs are logits."
        )
    if needs_classes and not task.has_classes:
        raise InputError(
            f"{who} scales classes, which {describe(task)} does not have. Use TemperatureScaling(per_label=True)."
        )
