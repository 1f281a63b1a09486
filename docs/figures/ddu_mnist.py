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


PANELS = (
    ("lenet-0", "entropy", "LeNet: entropy"),
    ("lenet-0", "log-density", "LeNet: log-density"),
    ("resnet18_sn-0", "log-density", "spectral norm: log-density"),
)


def draw():
    """Draw the shares of the bins of two networks."""
    results = json.loads(PUBLISHED.read_text())["results"]
    figure, panels = style.panels(3, height=3.2)
    for axes, (network, score, title) in zip(panels, PANELS, strict=True):
        histogram = results[network]["histograms"][score]
        for name, shares in histogram["shares"].items():
            colour, line = COLOURS[name]
            heights = [100 * share for share in shares]
            axes.stairs(heights, histogram["edges"], color=colour, linestyle=line, linewidth=2, label=name)
        axes.set(title=title, ylim=(0, None))
        axes.title.set_size(10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("images, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
