"""Differences of all methods to one of them, with their intervals."""

import itertools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lightning_uq.errors import InputError
from lightning_uq.report.figures.drawing import (
    COLORS,
    FAINT,
    GREY,
    PAPER,
    WIDTH,
    finish,
    heading,
    legend_below,
    new_figure,
    shortened,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = 0.68
"""Height of a line of text, in units of the distance between two methods of one line each."""


def difference_figure(
    differences: Mapping[str, tuple[float, float, float]],
    *,
    metric: str,
    reference: str,
    better: Literal["higher", "lower"],
    tied: Collection[str] = (),
    title: str = "",
    notes: Sequence[str] = (),
) -> "Figure":
    """One line per method: its difference to the reference with its interval; better methods are higher up.

    Args:
        differences: For each method the difference (method - reference) and the ends of its interval. The name of several methods with the same
            predictions is their names, separated by ", ".
        metric: What differs, for the axis.
        reference: The method that the others are compared with.
        better: Whether a higher or a lower value of the metric is better.
        tied: Methods that cannot be distinguished from the reference; they are grey with a hollow marker.
        title: Heading of the figure.
        notes: Lines under the heading, such as what the intervals are over.

    Raises:
        InputError: There is no method, a number is not finite, an interval does not contain its difference, or
            ``tied`` names an unknown method.

    Example:
        >>> figure = difference_figure({"ensemble": (-0.1, -0.15, -0.05)}, metric="NLL", reference="softmax", better="lower")
        >>> figure.axes[0].get_xlabel()
        'NLL minus softmax (← better)'
    """
    if not differences:
        raise InputError("`differences` is empty: it must hold at least one method.")
    for name, (difference, lower, upper) in differences.items():
        if not (math.isfinite(lower) and math.isfinite(upper) and lower <= difference <= upper):
            raise InputError(
                f"`differences[{name!r}]` must be a difference and the finite bounds of an interval around it, but it is "
                f"{(difference, lower, upper)}."
            )
    unknown = sorted(set(tied) - set(differences) - {reference})
    if unknown:
        raise InputError(f"`tied` names methods that `differences` does not have: {', '.join(unknown)}.")
    names = sorted(differences, key=lambda name: differences[name][0], reverse=better == "lower")
    labels = [_lines(name) for name in names]
    heights = [max(1.0, LINE * len(lines)) for lines in labels]
    ends = list(itertools.accumulate(heights))
    places = [end - (height + 1) / 2 for end, height in zip(ends, heights, strict=True)]
    figure = new_figure(WIDTH, 1.1 + 0.25 * ends[-1])
    axes, handles = figure.subplots(), {}
    axes.axvline(0, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    for y, name in zip(places, names, strict=True):
        difference, lower, upper = differences[name]
        is_tied = name in tied
        color, label = (
            (FAINT, f"tied with {shortened(reference)}")
            if is_tied
            else (COLORS[0], f"differs from {shortened(reference)}")
        )
        axes.plot([lower, upper], [y, y], color=color, linewidth=1.8, solid_capstyle="butt", zorder=2)
        (handles[label],) = axes.plot(
            [difference],
            [y],
            "o",
            color=color,
            markerfacecolor=PAPER if is_tied else color,
            markersize=5.5,
            label=label,
            zorder=3,
        )
    axes.set_yticks(places, ["\n".join(lines) for lines in labels])
    axes.set_ylim(-0.7, ends[-1] - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    direction = "better →" if better == "higher" else "← better"
    axes.set_xlabel(wrapped(f"{metric} minus {shortened(reference)} ({direction})", 28))
    heading(axes, title, notes, share=0.62)  # the methods' names take the rest
    legend_below(figure, [handles[label] for label in sorted(handles)])
    return finish(figure, grid="x")


def _lines(name: str) -> list[str]:
    names = ", ".join(map(shortened, name.split(", ")))
    return textwrap.wrap(names, 28, break_long_words=False, break_on_hyphens=False, max_lines=4, placeholder=" …")
