"""Confidence against accuracy of an overconfident network, before and after a temperature."""

from functools import partial

import torch

from docs.figures import style, toy
from lightning_uq import DeterministicModule, TemperatureScaling
from lightning_uq.data import two_moons
from lightning_uq.functional.calibration import bin_statistics, calibration_error, top_label
from lightning_uq.networks import MLP


def draw():
    """Train on few noisy rows for too long, and draw the bins of 4,000 test rows."""
    generator = torch.Generator().manual_seed(0)
    x, y = two_moons(5300, 0.3, generator=generator)
    torch.manual_seed(0)
    module = DeterministicModule(MLP(2, 2, hidden_sizes=(64, 64)), optimizer=partial(torch.optim.Adam, lr=0.01))
    scaling = TemperatureScaling()
    toy.train(module, (x[:300], y[:300]), (x[300:1300], y[300:1300]), epochs=60, callbacks=[scaling])
    calibrated = module.predict(x[1300:]).probs
    with torch.no_grad():
        raw = module(x[1300:])[0].softmax(-1)
    figure, axes = style.panels(2, sharey=True)
    for axis, probs, title in zip(
        axes, (raw, calibrated), ("trained", f"divided by T = {scaling.temperature:.1f}"), strict=True
    ):
        bins = bin_statistics(*top_label(probs.double(), y[1300:]), 10)
        count, correct, confidence = bins
        used = count > 0
        accuracy = (correct / count)[used]
        axis.plot([0.5, 1], [0.5, 1], color=style.GREY, linewidth=1, linestyle="--")
        axis.plot((confidence / count)[used], accuracy, color=style.BLUE, marker="o", markersize=4)
        axis.scatter(
            (confidence / count)[used],
            accuracy,
            s=300 * (count / count.sum())[used],
            color=style.SKY,
            alpha=0.5,
            linewidths=0,
        )
        axis.set(xlabel="confidence", title=f"{title}: ECE {float(calibration_error(bins)):.3f}")
    axes[0].set(ylabel="accuracy")
    return figure
