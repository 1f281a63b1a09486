"""Error rate and share of the answers as the least confident rows are left out, and the threshold that is certified."""

from functools import partial

import torch

from docs.figures import style, toy
from lightning_uq import DeterministicModule, SelectiveThreshold, TemperatureScaling
from lightning_uq.data import two_moons
from lightning_uq.networks import MLP


def draw():
    """Draw the risk of 4,000 test rows against the share that is answered."""
    x, y = two_moons(5300, 0.35, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = DeterministicModule(MLP(2, 2, hidden_sizes=(32, 32)), optimizer=partial(torch.optim.Adam, lr=0.01))
    callbacks = [TemperatureScaling(), SelectiveThreshold(risk=0.05)]
    toy.train(module, (x[:300], y[:300]), (x[300:1300], y[300:1300]), epochs=30, callbacks=callbacks)
    prediction, target = module.predict(x[1300:]), y[1300:]
    confidence, label = prediction.probs.max(-1)
    order = confidence.argsort(descending=True)
    number = torch.arange(1, len(target) + 1)
    risk = (label != target)[order].cumsum(0) / number
    figure, axis = style.panels(1)
    axis.plot((number / len(target))[50:], risk[50:], color=style.BLUE, label="errors among the answers")
    axis.axhline(0.05, color=style.ORANGE, linewidth=1.2, label="allowed")
    axis.axvline(
        prediction.answered.double().mean().item(),
        color=style.TEXT,
        linestyle="--",
        linewidth=1.2,
        label="certified threshold",
    )
    axis.set(xlabel="share of rows that are answered", ylabel="error rate", xlim=(0, 1), ylim=(0, None))
    axis.legend(loc="upper left", fontsize=8)
    return figure
