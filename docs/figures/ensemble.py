"""Five networks agree where there are data, and part where there are none."""

from docs.figures import toy
from lightning_uq import EnsembleModule


def draw():
    """Draw each member's mean, and the prediction that they make together."""
    module = EnsembleModule(toy.network, task="regression", num_members=5, seed=0, optimizer=toy.OPTIMIZER)
    return toy.hypotheses(module, titles=("five members", "their mixture"))
