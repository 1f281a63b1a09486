"""Labels and logits of any classifier's batches, as what is fitted after training reads them."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.predictions import ClassProbabilities
from lightning_uq.running.logits import LogitReader, is_uncertainty_module
from lightning_uq.running.ranks import gather_rows
from lightning_uq.tasks import Task, describe


def class_labels(reader: LogitReader, model: nn.Module, batch: Any, where: str) -> Tensor:
    """Class labels [B] of a batch.

    Raises:
        InputError: It has none; the message begins with ``where``.
    """
    _, y = reader.unpack(model, batch)
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        came = "none" if y is None else f"targets of {y.dtype if isinstance(y, Tensor) else type(y).__name__}"
        raise InputError(
            f"{where[0].upper()}{where[1:]} must hold class labels, but a batch has {came}. Pass argument `unpack_batch`, or a loader with "
            "`(x, y)`."
        )
    return y


def class_logits(
    reader: LogitReader,
    model: nn.Module,
    batch: Any,
    trainer: Trainer | None = None,
    *,
    check: bool = True,
    of_members: bool = False,
) -> Tensor:
    """Logits [Z, B, C] that a calibration is fitted to: of a Dirichlet, the log of its mean [1, B, C].

    Raises:
        InputError: The module predicts no classes, or the logits of members are asked for (``of_members``), and the predictions
            have none.
    """
    check_classes(reader.task(model), "The callback")
    logits = reader(model, batch, trainer, check=check)
    if reader.predict_fn is not None or not is_uncertainty_module(model):
        return logits
    prediction: ClassProbabilities = model.prediction(logits)  # type: ignore[operator]  # a Module's attribute is untyped
    return prediction.logits if of_members else prediction.calibration_logits


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
