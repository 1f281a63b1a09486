"""One network: its noise is right where there are data, and it stays as sure where there are none."""

from functools import partial

import torch

from docs.figures import moons, style, toy
from lightning_uq import DeterministicModule
from lightning_uq.networks import MLP


def draw():
    """Draw a regressor's band, and a classifier's entropy."""
    figure, (left, right) = style.panels(2)
    prediction = toy.fit(DeterministicModule(toy.network(), task="regression", optimizer=toy.OPTIMIZER))
    toy.points(left)
    toy.bands(left, prediction)
    left.set_title("a mean and a variance")
    left.legend(*(handles[::2] for handles in left.get_legend_handles_labels()), loc="upper right", fontsize=8)
    classifier = DeterministicModule(MLP(2, 2, hidden_sizes=(32, 32)), optimizer=partial(torch.optim.Adam, lr=0.01))
    moons.score_map(right, moons.fit(classifier).predictive_entropy, "entropy of the classes")
    return figure
