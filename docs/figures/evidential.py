"""A Dirichlet over class probabilities: vacuity is high where the evidence is low, entropy where classes compete."""

from functools import partial

import torch

from docs.figures import moons, style
from lightning_uq import EvidentialModule
from lightning_uq.networks import MLP


def draw():
    """Draw both scores around the two moons."""
    module = EvidentialModule(MLP(2, 2, hidden_sizes=(32, 32)), optimizer=partial(torch.optim.Adam, lr=0.01))
    prediction = moons.fit(module)
    figure, (left, right) = style.panels(2)
    moons.score_map(left, prediction.predictive_entropy, "entropy of the mean probabilities")
    moons.score_map(right, prediction.vacuity, "vacuity", style.PINK)
    return figure
