"""Five networks agree where there are data, and part where there are none."""

from docs.figures import style, toy
from lightning_uq import EnsembleModule


def draw():
    """Draw each member's mean, and the prediction that they make together."""
    prediction = toy.fit(EnsembleModule(toy.network, task="regression", num_members=5, seed=0, optimizer=toy.OPTIMIZER))
    figure, (left, right) = style.panels(2, sharey=True)
    toy.points(left)
    for member in prediction.member_mean:
        left.plot(toy.INPUTS[:, 0], member[:, 0], linewidth=1.2)
    left.set_title("five members")
    toy.points(right)
    toy.bands(right, prediction)
    right.set_title("their mixture")
    right.legend(loc="upper right", fontsize=8)
    return figure
