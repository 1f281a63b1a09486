"""What calibrates the predictions of a test, for callbacks that read these predictions themselves."""

from lightning.pytorch import Trainer
from torch import nn

from lightning_uq.callbacks.post_training import post_training_callbacks
from lightning_uq.running.transforms import PredictionTransform, transforms_of


def calibrating_callbacks(trainer: Trainer) -> list[str]:
    """The classes of the Trainer's callbacks that were fitted to change probabilities or intervals."""
    return [type(one).__name__ for one in post_training_callbacks(trainer) if one.recalibrates and one.fitted]


def calibrating_transforms(trainer: Trainer, model: nn.Module) -> list[PredictionTransform]:
    """What these callbacks make of the predictions of a module that is not ours, with ``attach`` or without; of one kind that of the last.

    A module of this package carries its calibrations itself, so there is nothing to add.
    """
    if transforms_of(model) is not None:
        return []
    found = [one.transform() for one in post_training_callbacks(trainer) if one.recalibrates and one.fitted]
    return list({one.kind: one for one in found if one is not None}.values())
