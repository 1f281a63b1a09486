"""A Gaussian over each weight: every draw of the weights is a function."""

from docs.figures import toy
from lightning_uq import BayesByBackpropModule


def draw():
    """Draw the mean for some draws of the weights, and the prediction of all."""
    module = BayesByBackpropModule(
        toy.network(), task="regression", kl_weight=0.1, optimizer=toy.OPTIMIZER, return_members=True
    )
    return toy.hypotheses(module, titles=("eight draws of the weights", "all draws together"))
