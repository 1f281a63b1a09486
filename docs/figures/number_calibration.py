"""Levels of intervals against their coverage: skewed noise that a Gaussian does not have, before and after."""

import torch

from docs.figures import style, toy
from lightning_uq import DeterministicModule, QuantileRecalibration, VarianceScaling


def draw():
    """Draw the share of targets below each predicted quantile, for 4,000 test rows."""
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(5100, 1, generator=generator) - 3
    y = x.sin() + 0.4 * torch.empty(5100, 1).exponential_(generator=generator)
    levels = torch.linspace(0.025, 0.975, 39)
    figure, axis = style.panels(1)
    axis.plot([0, 1], [0, 1], color=style.GREY, linewidth=1, linestyle="--")
    for callbacks, name, color in (
        ([], "trained", style.ORANGE),
        ([VarianceScaling()], "VarianceScaling", style.GREEN),
        ([QuantileRecalibration()], "QuantileRecalibration", style.BLUE),
    ):
        torch.manual_seed(0)
        module = DeterministicModule(toy.network(), task="regression", optimizer=toy.OPTIMIZER)
        toy.train(module, (x[:100], y[:100]), (x[100:1100], y[100:1100]), epochs=100, callbacks=callbacks)
        below = module.predict(x[1100:]).cdf(y[1100:]).flatten()
        axis.plot(levels, (below[:, None] <= levels).double().mean(0), color=color, label=name)
    axis.set(xlabel="predicted probability of a smaller target", ylabel="share of test targets", aspect="equal")
    axis.legend(loc="lower right", fontsize=8)
    return figure
