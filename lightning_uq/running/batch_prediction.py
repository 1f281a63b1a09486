"""The prediction of one batch, as a module makes it, read inside a hook of another step."""

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
    """Outputs [Z, B, ...] of a batch, and the prediction that the module makes of them.

    A module of this package applies the calibrations that it carries. Any other module's prediction is that of its outputs, with ``further`` changes.

    Args:
        read: Reads the outputs.
        model: The model.
        batch: The batch, on the model's device.
        trainer: Its Trainer, if there is one.
        check: Whether to look at the outputs' values.
        further: What changes the predictions of a module that is not ours.
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
