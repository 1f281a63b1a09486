"""Weights that are a linear function of a random index give a family of functions."""

from docs.figures import toy
from lightning_uq import HypermodelModule
from lightning_uq.networks import PriorIndependentLayers


def draw():
    """Draw the mean for some indices, and the prediction of all."""
    module = HypermodelModule(
        toy.network(),
        task="regression",
        prior=lambda: PriorIndependentLayers(1, 2, index_dim=8),
        prior_scale=0.5,
        optimizer=toy.OPTIMIZER,
        return_members=True,
    )
    return toy.hypotheses(module, epochs=400, titles=("eight indices", "all indices together"))
