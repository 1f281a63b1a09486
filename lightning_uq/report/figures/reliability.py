"""The reliability diagram: how often predictions of a confidence are right."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import bin_statistics
from lightning_uq.report.figures.drawing import FAINT, GREY, IN_COLOR, INK, WIDTH, finish, heading, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_ROWS = 10
"""Bins with fewer rows are grey: their bar says little."""


def reliability_diagram(
    confidence: Tensor,
    correct: Tensor,
    *,
    title: str = "",
    note: str = "",
    num_bins: int = 15,
    event: str | None = None,
    repeats: int = 1,
) -> "Figure":
    """Accuracy against confidence, bin by bin with 95 % Wilson intervals, above the number of predictions in each bin.

    Args:
        confidence: Probability of the predicted class [N], or of a binary event.
        correct: Whether that class was right [N], or whether the event happened.
        title: Heading of the figure.
        note: A line under the heading, such as the calibration error.
        num_bins: Number of equal-width bins.
        event: Name of the event if the probabilities are those of a binary event.
        repeats: How often the rows come from the same data set, such as the number of seeds whose predictions are
            pooled. The intervals and the limit of 10 rows count N / ``repeats`` rows, since predictions of the same row
            are not independent.

    Raises:
        InputError: There is no prediction, the shapes differ, a confidence is outside [0, 1], or ``repeats`` is below 1.

    Example:
        >>> figure = reliability_diagram(torch.tensor([0.6, 0.9]), torch.tensor([False, True]))
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['Accuracy', 'Inputs']
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise InputError(
            "`confidence` and `correct` must both have the shape [N] with N > 0, but their shapes are "
            f"{list(confidence.shape)} and {list(correct.shape)}."
        )
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise InputError("`confidence` must hold probabilities in [0, 1], but at least one value is outside or NaN.")
    if repeats < 1:
        raise InputError(f"`repeats` must be at least 1, but it is {repeats}.")
    count, hits, _ = bin_statistics(confidence.cpu(), correct.cpu(), num_bins)
    used = count > 0
    centre = ((torch.arange(num_bins) + 0.5)[used] / num_bins).numpy()
    accuracy, rows = (hits / count)[used].numpy(), (count[used] / repeats).numpy()
    few = rows < MIN_ROWS

    figure = new_figure(WIDTH, 3.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 0.92 / num_bins
    colors = [FAINT if one else IN_COLOR for one in few]
    top.bar(centre, accuracy, width, color=colors, alpha=0.7, zorder=2)
    top.errorbar(centre, accuracy, wilson(accuracy, rows), fmt="none", color=INK, elinewidth=0.8, capsize=2, zorder=3)
    top.plot([0, 1], [0, 1], color=GREY, linewidth=1.2, linestyle="--", zorder=4)
    notes = [note, "Dashed: calibrated. Whiskers: 95 % intervals."]
    if few.any():
        notes.append(f"Grey: bins with fewer than {MIN_ROWS} {'different rows' if repeats > 1 else 'rows'}.")
    top.set(ylabel="Observed frequency" if event else "Accuracy", xlim=(0, 1), ylim=(0, 1.03))
    heading(top, title, notes)
    bottom.bar(centre, count[used].numpy(), width, color=colors, alpha=0.7)
    bottom.set_xlabel(f"Predicted probability of {event}" if event else "Confidence")
    bottom.set(ylabel="Inputs", yscale="log", ylim=(0.7, 2 * len(confidence)))
    powers = [10**power for power in range(9) if 10**power <= 2 * len(confidence)]
    bottom.set_yticks(powers[:: 1 + (len(powers) - 1) // 4], minor=False)
    bottom.set_yticks([], minor=True)
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    return finish(figure)


def wilson(share: Any, count: Any, z: float = 1.96) -> Any:
    """Distances [2, N] from a share of successes down and up to the ends of its Wilson interval."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [(share - centre + half).clip(0), (centre + half - share).clip(0)]
