"""The Neural Testbed's agents: divergence from the environment against weights, from the published results."""

import json
from pathlib import Path
from statistics import mean

import matplotlib as mpl

from docs.figures import style

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "reproduce" / "published" / "testbed.json"
LINES = {  # label: agents that differ in their members alone, marker and colour
    "ensemble (1, 10, 30)": (("MLP", "ensemble, 10", "ensemble, 30"), "o-", style.BLUE),
    "ensemble+ (10, 30)": (("ensemble+, 10", "ensemble+, 30"), "s-", style.YELLOW),
    "dropout": (("dropout",), "^", style.GREEN),
    "Bayes by backprop": (("Bayes by backprop",), "v", style.PINK),
    "hypermodel": (("hypermodel",), "P", style.SKY),
    "epinet": (("epinet",), "*", style.ORANGE),
}


def draw():
    """Draw the mean divergence of one label and of ten over the generated problems, against the mean number of weights."""
    results = json.loads(PUBLISHED.read_text())["results"]
    problems = [agents for job, agents in results.items() if not job.startswith("stored")]
    with mpl.rc_context({"font.size": 13}):  # readable on a telephone, whose page is half as wide
        figure, panels = style.panels(2, height=4.4)
        for axes, tau in zip(panels, (1, 10), strict=True):
            for label, (agents, marker, colour) in LINES.items():
                keys = ("weights", f"kl_tau{tau}")
                places = [[mean(problem[agent][key] for problem in problems) for agent in agents] for key in keys]
                axes.plot(*places, marker, color=colour, label=label, markersize=14 if marker == "*" else 9)
            axes.set(xscale="log", xlabel="weights", title="one label" if tau == 1 else f"{tau} labels together")
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)  # whole markers
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("KL, nats")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
