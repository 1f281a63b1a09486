"""Dropout that stays on: every mask is a function."""

from docs.figures import toy
from lightning_uq import DropoutModule


def draw():
    """Draw the mean for some masks, and the prediction of all."""
    module = DropoutModule(
        toy.network(width=100, dropout=0.05), task="regression", optimizer=toy.OPTIMIZER, return_members=True
    )
    return toy.hypotheses(module, epochs=300, titles=("eight masks", "all masks together"))
