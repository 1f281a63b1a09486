"""Learning curves on the digits: the accuracy of an ensemble against its number of labels, for each strategy."""

import json
from pathlib import Path

import numpy as np

from docs.figures import style

RESULTS = Path(__file__).parents[2] / "benchmarks" / "active_digits.json"
COLORS = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.YELLOW, style.SKY)


def draw():
    """Draw the mean over seeds, in a band of one standard error, of the strategies that train an ensemble."""
    results = json.loads(RESULTS.read_text())
    names = [name for name in results["curves"] if "@" not in name]
    figure, axes = style.panels(height=3.4)
    colors = iter(COLORS)
    for name in names:
        runs = np.array(results["curves"][name]["accuracy"])
        mean, error = runs.mean(0), runs.std(0, ddof=1) / len(runs) ** 0.5
        color, dashes = (style.GREY, "--") if name == "random" else (next(colors), "-")
        axes.plot(results["labels"], mean, color=color, linestyle=dashes, label=name)
        axes.fill_between(results["labels"], mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="labels", ylabel="test accuracy")
    axes.legend(fontsize=9)
    return figure
