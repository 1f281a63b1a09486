"""Learning curves of active learning."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.standard_error import standard_errors
from lightning_uq.report.figures.drawing import COLORS, GREY, LINES, WIDTH, finish, heading, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_figure(
    labels: Sequence[int],
    curves: Mapping[str, Tensor],
    *,
    ylabel: str = "Test accuracy",
    baseline: str | None = None,
    title: str = "",
) -> "Figure":
    """A metric against the number of labels: the mean over seeds, in a band of one standard error to either side.

    Args:
        labels: Numbers of labels [K], ascending.
        curves: For each strategy the metric of its runs [S, K].
        ylabel: Name of the metric.
        baseline: The strategy that is drawn in grey.
        title: Heading of the figure.

    Raises:
        InputError: There is no curve, or its length is not that of ``labels``.

    Example:
        >>> import torch
        >>> figure = learning_figure([20, 40], {"random": torch.tensor([[0.5, 0.7], [0.4, 0.8]])})
        >>> figure.axes[0].get_xlabel()
        'Labels'
    """
    if not curves or any(runs.ndim != 2 or not len(runs) or runs.shape[1] != len(labels) for runs in curves.values()):
        raise InputError(
            f"`curves` must hold runs [S, {len(labels)}] of at least one strategy, but it holds "
            f"{ {name: list(runs.shape) for name, runs in curves.items()} }."
        )
    figure = new_figure(WIDTH, 3.4)
    axes, lines = figure.subplots(), []
    others = [name for name in curves if name != baseline]
    for name, runs in curves.items():
        style: dict[str, Any] = {"color": GREY, "linestyle": LINES[1]}
        if name != baseline:
            i = others.index(name)
            style = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[2 * (i // len(COLORS)) % len(LINES)]}
        mean = runs.double().mean(0)
        lines += axes.plot(labels, mean, label=name, linewidth=1.8, **style)
        if len(runs) > 1:
            error = standard_errors(runs.double())
            axes.fill_between(labels, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="Labels", ylabel=ylabel)
    heading(axes, title)
    legend_below(figure, lines)
    return finish(figure)
