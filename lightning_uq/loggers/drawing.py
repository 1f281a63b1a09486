"""The figures of sums."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_uq.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_figure(bins: Tensor, *, title: str = "", note: str = "") -> "Figure":
    """How often predictions of a probability came true, bin by bin, above the number of predictions in each bin.

    Args:
        bins: For each bin the rows, the rows that came true, and the sum of probabilities [3, num_bins].
        title: Heading of the figure.
        note: A line in the figure, such as the calibration error.

    Example:
        >>> bins = torch.tensor([[4.0, 6.0], [1.0, 5.0], [1.2, 5.4]])
        >>> [axes.get_ylabel() for axes in reliability_figure(bins).axes]
        ['Observed frequency', 'Rows']
    """
    count, hits, _ = bins.cpu()
    used, num_bins = count > 0, bins.shape[1]
    centre = ((torch.arange(num_bins) + 0.5)[used] / num_bins).numpy()
    figure = new_figure(4.2, 4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(centre, (hits / count)[used].numpy(), 0.92 / num_bins)
    top.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    top.set(ylabel="Observed frequency", xlim=(0, 1), ylim=(0, 1.02))
    top.set_title("\n".join(filter(None, (title, note))), fontsize=10)
    bottom.bar(centre, count[used].numpy(), 0.92 / num_bins)
    bottom.set(xlabel="Predicted probability", ylabel="Rows", yscale="log")
    return figure


def coverage_figure(coverage: Tensor, levels: Tensor, *, num_rows: int, title: str = "") -> "Figure":
    """Observed coverage of central intervals against their level.

    Args:
        coverage: The share of targets inside the intervals of each level [L].
        levels: The levels [L], increasing.
        num_rows: Number of targets.
        title: Heading of the figure.

    Example:
        >>> coverage_figure(torch.tensor([0.4, 0.85]), torch.tensor([0.5, 0.9]), num_rows=20).axes[0].get_xlabel()
        'Level of the interval'
    """
    figure = new_figure(4.2, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    axes.plot(levels.numpy(), coverage.numpy(), marker="o")
    axes.set(xlabel="Level of the interval", ylabel="Observed coverage", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("\n".join(filter(None, (title, f"{num_rows:,} targets"))), fontsize=10)
    return figure
