"""DDU on the MNIST family: histograms of entropy and log-density for digits, ambiguous digits and FashionMNIST, from the published results."""

import json
from pathlib import Path

from docs.figures import style

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "reproduce" / "published" / "ddu.json"
COLOURS = {
    "MNIST": (style.BLUE, "-"),
    "ambiguous digits": (style.ORANGE, "--"),
    "FashionMNIST": (style.GREEN, ":"),
}


def draw():
    """Draw the shares of the first network's bins."""
    first = next(iter(json.loads(PUBLISHED.read_text())["results"].values()))
    figure, panels = style.panels(2, height=3.4)
    for axes, (score, histogram) in zip(panels, first["histograms"].items(), strict=True):
        for name, shares in histogram["shares"].items():
            colour, line = COLOURS[name]
            axes.stairs(
                [100 * share for share in shares],
                histogram["edges"],
                color=colour,
                linestyle=line,
                linewidth=2,
                label=name,
            )
        axes.set(xlabel=score, ylim=(0, None))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("images, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
