"""The entropy says where classes meet, the density of the features says where the data are."""

from functools import partial

import torch

from docs.figures import moons, style
from lightning_uq import DeterministicModule, FitGMM
from lightning_uq.networks import spectral_normalize
from lightning_uq.networks.backbones import FCResNet


def draw():
    """Draw both scores around the two moons."""
    torch.manual_seed(0)
    network = spectral_normalize(FCResNet(2, num_classes=2), coefficient=0.95, n_power_iterations=5, exclude=["last"])
    module = DeterministicModule(network, optimizer=partial(torch.optim.Adam, lr=0.01))
    prediction = moons.fit(module, epochs=60, callbacks=[FitGMM()])
    figure, (left, right) = style.panels(2)
    moons.score_map(left, prediction.predictive_entropy, "entropy of the classes")
    moons.score_map(right, prediction.ood_score, "score of the density", style.PINK, cap=0.8)
    return figure
