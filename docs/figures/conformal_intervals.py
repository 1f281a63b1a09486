"""Intervals about one network: of one width, and of a width that follows the predicted standard deviation."""

import torch

from docs.figures import style, toy
from lightning_uq import ConformalIntervals, DeterministicModule


def draw():
    """Draw both kinds around the same network."""
    figure, axes = style.panels(2, sharey=True)
    for axis, method in zip(axes, ("absolute", "normalized"), strict=True):
        torch.manual_seed(0)
        module = DeterministicModule(toy.network(), task="regression", optimizer=toy.OPTIMIZER)
        x, y = toy.data(260)
        toy.train(
            module,
            (x[:64], y[:64]),
            (x[64:], y[64:]),
            epochs=200,
            callbacks=[ConformalIntervals(alpha=0.1, method=method)],
        )
        prediction = module.predict(toy.INPUTS)
        axis.scatter(x, y, s=5, color=style.GREY, linewidths=0)
        axis.fill_between(
            toy.INPUTS[:, 0],
            prediction.conformal_lower[:, 0],
            prediction.conformal_upper[:, 0],
            color=style.SKY,
            alpha=0.45,
            linewidth=0,
            label="90 % interval",
        )
        axis.plot(toy.INPUTS[:, 0], prediction.mean[:, 0], color=style.TEXT, label="mean")
        axis.set(xlim=(-4.5, 3.5), ylim=(-3, 3.5), xlabel="x", title=f'method="{method}"')
    axes[1].legend(loc="upper right", fontsize=8)
    return figure
