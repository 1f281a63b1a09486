"""A distribution over atoms for each hypothesis, with random priors on the means."""

import torch

from docs.figures import toy
from lightning_uq import CategoricalRegressionModule
from lightning_uq.networks import CatMLPEnsemble


def draw():
    """Draw each member's mean, and the prediction that they make together."""
    network = CatMLPEnsemble(1, torch.linspace(-3, 3, 25), num_members=8, hidden_sizes=(32, 32), seed=0)
    return toy.hypotheses(
        CategoricalRegressionModule(network, optimizer=toy.OPTIMIZER), titles=("eight members", "their mixture")
    )
