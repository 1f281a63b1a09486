"""A small head reads the features and a random index, and its draws part where there are no data."""

from docs.figures import toy
from lightning_uq import EpinetHead, EpinetModule


def draw():
    """Draw the mean for some indices, and the prediction of all."""
    module = EpinetModule(
        toy.network(),
        task="regression",
        head=EpinetHead(include_inputs=True, prior_scale=0.3),
        optimizer=toy.OPTIMIZER,
        return_members=True,
    )
    return toy.hypotheses(module, epochs=400, titles=("eight indices", "all indices together"))
