"""Regret of a bandit's agents: the median over problems, and the quartiles."""

import json
from pathlib import Path

import numpy as np

from docs.figures import style

RESULTS = Path(__file__).parents[2] / "benchmarks" / "bandit.json"
COLORS = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.YELLOW)


def draw():
    """Draw a curve per agent but `uniform`, which is ten times higher, with its name at its end."""
    results = json.loads(RESULTS.read_text())
    figure, axes = style.panels(height=3.6)
    steps, ends = np.array(results["curve_steps"]), {}
    names = [name for name in results["curves"] if name != "uniform"]
    for name, color in zip(names, COLORS, strict=True):
        low, median, high = np.quantile(np.array(results["curves"][name]), [0.25, 0.5, 0.75], axis=0)
        axes.plot(steps, median, color=color)
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        ends[name] = median[-1], color
    # On a linear scale the lowest three curves would be one line, far from their names.
    axes.set_yscale("function", functions=(lambda y: np.abs(y) ** 0.5, np.square))
    axes.set(xlabel="step", ylabel="median regret (square-root scale)", xlim=(0, steps[-1]), ylim=(0, None))
    axes.set_yticks([0, 1, 5, 10, 20, 40, 80])
    room = 0.07 * axes.get_ylim()[1] ** 0.5
    place = -room
    for name, (end, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = max(end**0.5, place + room)  # names do not overlap
        label = f" {name} ({end:.1f})"
        axes.annotate(label, (steps[-1], place**2), color=color, fontsize=9, va="center", annotation_clip=False)
    return figure
