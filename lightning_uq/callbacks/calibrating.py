"""The fitted calibrations in a Trainer, for callbacks that read test predictions themselves."""

from lightning.pytorch import Trainer
from torch import nn

from lightning_uq.callbacks.post_training import post_training_callbacks
from lightning_uq.running.transforms import PredictionTransform, transforms_of


def calibrating_callbacks(trainer: Trainer) -> list[str]:
    """The class names of the Trainer's fitted callbacks that change probabilities or intervals."""
    return [type(one).__name__ for one in post_training_callbacks(trainer) if one.recalibrates and one.fitted]


def calibrating_transforms(trainer: Trainer, model: nn.Module) -> list[PredictionTransform]:
    """The calibrations to apply to the predictions of a foreign module, with or without ``attach``; the last one of each kind.

    The list is empty for a module of this package, whose predictions carry their calibrations.
    """
    if transforms_of(model) is not None:
        return []
    found = [one.transform() for one in post_training_callbacks(trainer) if one.recalibrates and one.fitted]
    return list({one.kind: one for one in found if one is not None}.values())
