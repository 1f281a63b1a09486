"""Labels and logits of any model's batches, as what is fitted after training reads them."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.ranks import gather_rows
from lightning_uq.tasks import Task, describe


def labelled_batch(reader: LogitReader, model: nn.Module, batch: Any, outputs: Tensor, where: str) -> Tensor:
    """The target of a batch, checked by the task.

    Args:
        reader: How the model's batches are read.
        model: The model.
        batch: The batch.
        outputs: Its outputs [Z, B, ...].
        where: What the batch belongs to, the beginning of the message.

    Raises:
        InputError: There is none, or it does not fit the outputs.
    """
    target = target_of(reader, model, batch, where)
    task = reader.task(model)
    try:
        task.check_target(target, outputs)
    except InputError as error:
        raise InputError(f"{where[0].upper()}{where[1:]} does not fit {describe(task)}. {error}") from error
    return target


def target_of(reader: LogitReader, model: nn.Module, batch: Any, where: str) -> Tensor:
    """The target of a batch.

    Raises:
        InputError: There is none; the message begins with ``where``.
    """
    _, target = reader.unpack(model, batch)
    if not isinstance(target, Tensor):
        came = "none" if target is None else f"targets of {type(target).__name__}"
        raise InputError(
            f"{where[0].upper()}{where[1:]} must hold targets, but a batch has {came}. Pass argument `unpack_batch`, or a loader "
            "with `(x, y)`."
        )
    return target


def class_labels(reader: LogitReader, model: nn.Module, batch: Any, where: str) -> Tensor:
    """Class labels [B] of a batch whose outputs are not at hand.

    Raises:
        InputError: It has none; the message begins with ``where``.
    """
    target = target_of(reader, model, batch, where)
    if not reader.task(model).has_classes or reader.task(model).accepts(target) is not None:
        raise InputError(
            f"{where[0].upper()}{where[1:]} must hold class labels, but a batch has targets of {target.dtype}. Pass argument "
            "`unpack_batch`, or a loader with `(x, y)`."
        )
    return target


def calibration_rows(
    reader: LogitReader,
    model: nn.Module,
    batch: Any,
    trainer: Trainer | None = None,
    *,
    where: str,
    check: bool = True,
    of_members: bool = False,
    kept: Callable[[int], Tensor | None] = lambda num_rows: None,
) -> tuple[Tensor, Tensor]:
    """What a calibration is fitted to: logits [Z, N, C] and labels [N], one row per label that counts.

    They are the members' logits; of a Dirichlet, the log of its mean [1, N, C].

    Args:
        reader: How the model is called.
        model: The model.
        batch: The batch.
        trainer: Its Trainer, if there is one.
        where: What the batch belongs to, the beginning of messages.
        check: Whether to compare the outputs with the task.
        of_members: Whether the logits of the members are needed.
        kept: ``kept(B)`` is the mask of the samples that count; None for all.

    Raises:
        InputError: The model predicts no classes, its batch has no labels, or the logits of members are asked for
            (``of_members``), and the predictions have none.
    """
    task = reader.task(model)
    check_classes(task, "The callback")
    outputs = reader(model, batch, trainer, check=check)
    target = labelled_batch(reader, model, batch, outputs, where)
    keep = kept(len(target))
    if keep is not None:
        outputs, target = outputs[:, keep.to(outputs.device)], target[keep.to(target.device)]
    prediction, labels = task.rows(reader.prediction(model, outputs, to_members=False), target)
    return (prediction.logits if of_members else prediction.calibration_logits), labels


def check_classes(task: Task, who: str) -> None:
    """Raise an :class:`InputError` for a task whose predictions are no class probabilities."""
    if not task.has_classes:
        raise InputError(f"{who} calibrates class probabilities, which {describe(task)} does not predict.")


def gather_logits(logits: list[Tensor], labels: list[Tensor], trainer: Trainer | None) -> tuple[Tensor, Tensor]:
    """Logits [N, Z, C] and labels [N] of all ranks; a rank without any learns the shape from the others. A collective."""
    rows = torch.cat(logits) if logits else torch.empty(0, 0, 0, dtype=torch.float64)
    y = torch.cat(labels).long() if labels else torch.empty(0, dtype=torch.long)
    if trainer is None or trainer.world_size == 1:
        return rows, y
    device = trainer.strategy.root_device
    shapes = gather_rows(torch.tensor([rows.shape[1:]], device=device), trainer)
    rows = rows.reshape(len(rows), *shapes.amax(0).tolist())
    return gather_rows(rows.to(device, wide_dtype(device)), trainer), gather_rows(y.to(device), trainer)
