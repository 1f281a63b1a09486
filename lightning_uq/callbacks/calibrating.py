"""The fitted calibrations in a Trainer, for callbacks that read test predictions themselves."""

from lightning.pytorch import Trainer
from torch import nn

from lightning_uq.callbacks.post_training import PostTrainingCallback, post_training_callbacks
from lightning_uq.running.logits import LogitReader, is_uncertainty_module
from lightning_uq.running.same_reading import difference_of_readings
from lightning_uq.running.transforms import PredictionTransform


def calibrating_callbacks(trainer: Trainer, model: nn.Module, reader: LogitReader) -> list[PostTrainingCallback]:
    """The Trainer's fitted callbacks that change the probabilities or intervals of predictions that ``reader`` reads."""
    found = [one for one in post_training_callbacks(trainer) if one.recalibrates and one.fitted]
    if is_uncertainty_module(model):
        return found
    return [one for one in found if difference_of_readings(one.logits, reader) is None]


def calibrating_transforms(trainer: Trainer, model: nn.Module, reader: LogitReader) -> list[PredictionTransform]:
    """The calibrations to apply to the predictions of a foreign module, with or without ``attach``; the last one of each kind.

    The list is empty for a module of this package, whose predictions carry their calibrations.
    """
    if is_uncertainty_module(model):
        return []
    found = [one.transform() for one in calibrating_callbacks(trainer, model, reader)]
    return list({one.kind: one for one in found if one is not None}.values())
