"""A Gaussian over the weights of the last layer widens the band away from the data."""

import torch

from docs.figures import style, toy
from lightning_uq import DeterministicModule, FitLaplace


def draw():
    """Draw one network before and after."""
    figure, axes = style.panels(2, sharey=True)
    for axis, callbacks, title in zip(
        axes, ([], [FitLaplace()]), ("the trained network", "with FitLaplace"), strict=True
    ):
        torch.manual_seed(0)
        module = DeterministicModule(toy.network(), task="regression", optimizer=toy.OPTIMIZER)
        toy.points(axis)
        toy.bands(axis, toy.fit(module, callbacks=callbacks))
        axis.set_title(title)
    axes[1].legend(loc="upper right", fontsize=8)
    return figure
