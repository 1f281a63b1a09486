"""The module's prediction of one batch, computed inside a hook of another step."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.predictions import Prediction
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.transforms import PredictionTransform, observing_all, transforms_of


def predict_batch(
    read: LogitReader,
    model: nn.Module,
    batch: Any,
    trainer: Trainer | None = None,
    *,
    check: bool = True,
    further: Sequence[PredictionTransform] = (),
) -> tuple[Tensor, Prediction]:
    """Outputs [Z, B, ...] of a batch, and the module's prediction from them.

    A module of this package applies the calibrations that it carries. For any other module, the prediction is made from the outputs and changed by ``further``.

    Args:
        read: Reader of the outputs.
        model: The model.
        batch: The batch, on the model's device.
        trainer: The Trainer, if there is one.
        check: Whether to check the values of the outputs.
        further: The changes to the predictions of a foreign module.
    """
    transforms = None if read.predict_fn is not None else transforms_of(model)
    if transforms is None and not further:
        outputs = read(model, batch, trainer, check=check)
        return outputs, read.prediction(model, outputs)
    x, _ = read.unpack(model, batch)
    observing = (
        observing_all(further, model, x, for_metrics=True)
        if transforms is None
        else transforms.observing(model, x, for_metrics=True)
    )
    with observing as transformed:
        outputs = read(model, batch, trainer, check=check)
    return outputs, transformed(read.prediction(model, outputs, to_members=False))
