"""Two scores of a trained network's features: the distance to the nearest ones, and a virtual logit."""

from functools import partial

import torch

from docs.figures import moons, style
from lightning_uq import DeterministicModule, FitKNN, FitViM
from lightning_uq.networks import MLP


def draw():
    """Draw both scores around the two moons."""
    figure, axes = style.panels(2)
    for axis, callback, title in zip(
        axes, (FitKNN(k=10), FitViM()), ("distance to the 10th neighbour", "virtual-logit matching"), strict=True
    ):
        torch.manual_seed(0)
        module = DeterministicModule(MLP(2, 2, hidden_sizes=(32, 32)), optimizer=partial(torch.optim.Adam, lr=0.01))
        moons.score_map(axis, moons.fit(module, callbacks=[callback]).ood_score, title, style.PINK, cap=0.95)
    return figure
