"""The prediction of one batch, as a module makes it, read inside a hook of another step."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.predictions import Prediction
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.transforms import transforms_of


def predict_batch(
    read: LogitReader, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, check: bool = True
) -> tuple[Tensor, Prediction]:
    """Outputs [Z, B, ...] of a batch, and the prediction that the module makes of them.

    A module of this package applies the calibrations that it carries. Any other module's prediction is that of its outputs.

    Args:
        read: Reads the outputs.
        model: The model.
        batch: The batch, on the model's device.
        trainer: Its Trainer, if there is one.
        check: Whether to look at the outputs' values.
    """
    transforms = None if read.predict_fn is not None else transforms_of(model)
    if transforms is None:
        outputs = read(model, batch, trainer, check=check)
        return outputs, read.prediction(model, outputs)
    x, _ = read.unpack(model, batch)
    with transforms.observing(model, x, for_metrics=True) as transformed:
        outputs = read(model, batch, trainer, check=check)
    return outputs, transformed(read.prediction(model, outputs, to_members=False))
