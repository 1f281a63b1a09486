"""One network predicts the parameters of a distribution over means and variances."""

from docs.figures import style, toy
from lightning_uq import EvidentialRegression, EvidentialRegressionModule


def draw():
    """Draw the Student-t's band and the part that the mean has, for two weights of the regularizer."""
    figure, axes = style.panels(2, sharey=True)
    for axis, factor in zip(axes, (0.01, 0.3), strict=True):
        task = EvidentialRegression(reg_factor=factor)
        toy.points(axis)
        toy.bands(axis, toy.fit(EvidentialRegressionModule(toy.network(4), task=task, optimizer=toy.OPTIMIZER)))
        axis.set_title(f"regularizer times {factor:g}")
    axes[1].legend(loc="upper right", fontsize=8)
    return figure
