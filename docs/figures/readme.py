"""Draw README.md's figure from the objects of README.md's examples: `python docs/figures/readme.py`."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from lightning_uq.report import COLORS, new_figure
from tests.readme import run_examples

CLASSES = (COLORS[0], COLORS[4], COLORS[2])
FAR = COLORS[1]


def make_figure(names: dict[str, Any]) -> Figure:
    """The figure.

    Args:
        names: The names that the examples of README.md define.
    """
    figure = new_figure(10.5, 3.6)
    left, middle, right = figure.subplots(1, 3)
    across, along = torch.linspace(-6, 6, 90), torch.linspace(-12, 7, 120)
    grid = torch.cartesian_prod(across, along)
    shape = len(across), len(along)
    disagreement = names["ensemble"].predict(grid).mutual_information
    p_value = names["watched"].predict(grid).ood_p_value
    maps = {
        left: (disagreement, "Disagreement of 5 members, nats", "Greys", None),
        middle: (p_value, "p-value of the alarm", "Greys_r", LogNorm(float(p_value.min()), 1)),
    }
    x, y, far_x = names["x"][1000:], names["y"][1000:], names["far_x"]
    for axes, (values, title, colors, norm) in maps.items():
        image = axes.pcolormesh(
            across.numpy(), along.numpy(), values.reshape(shape).T.numpy(), cmap=colors, norm=norm, rasterized=True
        )
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
        for label, color in enumerate(CLASSES):
            axes.scatter(*x[y == label].T.numpy(), s=4, color=color, label=f"class {label}")
        axes.scatter(*far_x[::5].T.numpy(), s=9, color=FAR, marker="x", linewidths=0.8, label="far inputs")
        axes.set(title=title, xlim=(-6, 6), ylim=(-12, 7))
    left.legend(loc="upper right", fontsize=7, handletextpad=0.2, borderpad=0.3)
    order = x[:, 0].argsort()
    interval, targets = names["interval"], names["amounts"][1000:]
    parts = (x[:, :1], interval.conformal_lower, interval.conformal_upper, interval.mean, targets)
    inputs, low, high, mean, targets = (part[order, 0].numpy() for part in parts)
    right.fill_between(inputs, low, high, color=COLORS[5], alpha=0.5, linewidth=0, label="90 % interval")
    right.plot(inputs, mean, color=COLORS[0], label="mean")
    right.scatter(inputs, targets, s=4, color=COLORS[6], label="test targets")
    share = names["inside"].float().mean()
    right.set(title=f"90 % intervals, which cover {100 * share:.1f} %")
    right.legend(loc="upper left", fontsize=7)
    for axes in (left, middle, right):
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
    return figure


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".png").resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        figure = make_figure(run_examples())
        os.chdir(path.parent)  # so that the folder can be removed
    figure.savefig(path, dpi=130)
    print(f"Wrote {path}")
