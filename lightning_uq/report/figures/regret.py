"""Regret of bandits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.report.figures.drawing import COLORS, LINES, WIDTH, finish, heading, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)


def regret_figure(regret: Mapping[str, Tensor], *, title: str = "") -> "Figure":
    """Regret up to each step: the median over runs, in a band from the first to the third quartile.

    A few runs in which an agent is stuck would dominate a mean. The legend names each method's last median.

    Args:
        regret: For each method the cumulative regret of its runs [S, T].
        title: Heading of the figure.

    Raises:
        InputError: No method, or one without a run.

    Example:
        >>> import torch
        >>> figure = regret_figure({"softmax": torch.tensor([[0.5, 0.7, 0.7], [0.1, 0.1, 0.2]])})
        >>> figure.axes[0].get_ylabel().splitlines()
        ['Cumulative regret, median', '(square-root scale)']
    """
    if not regret or any(runs.ndim != 2 or not runs.numel() for runs in regret.values()):
        raise InputError(
            f"`regret` must hold runs [S, T] of at least one method, but it holds "
            f"{ {method: list(runs.shape) for method, runs in regret.items()} }."
        )
    figure = new_figure(WIDTH, 3.4)
    axes, lines = figure.subplots(), []
    for i, (method, runs) in enumerate(regret.items()):
        low, median, high = runs.double().quantile(QUARTILES.to(runs.device), 0).cpu().numpy()
        step = range(1, runs.shape[1] + 1)
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}
        lines += axes.plot(step, median, label=f"{method} ({median[-1]:.3g})", linewidth=1.8, **style)
        if len(runs) > 1:
            axes.fill_between(step, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="Step", ylabel="Cumulative regret, median\n(square-root scale)")
    axes.set_xlim(1, max(2, *(runs.shape[1] for runs in regret.values())))
    # Agents that learn are hundreds of times better than chance: on a linear scale they would be one line.
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
    top = max(float(axes.dataLim.y1), 0.1)
    ticks: list[float] = []
    for tick in (base * 10.0**power for power in range(8, -5, -1) for base in (5, 2, 1)):
        last = ticks[-1] if ticks else 4 * top
        if tick <= top and (last / top) ** 0.5 - (tick / top) ** 0.5 >= 0.08 <= (tick / top) ** 0.5:
            ticks.append(tick)  # far enough from the one above and from 0
    axes.set_yticks([0, *reversed(ticks)])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylim(0, 1.05 * top)
    heading(axes, title)
    legend_below(figure, lines)
    return finish(figure)
