"""Risk-coverage curves: the risk among the inputs that a method is most certain about."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.sparsification import sparsification_curve
from lightning_uq.report.figures.drawing import (
    FAINT,
    GREY,
    WIDTH,
    finish,
    heading,
    line_styles,
    methods_legend,
    new_figure,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Points per line: more cannot be seen, and would make the page large."""

NAMED_LINES = 3
"""Grey lines that are named, at most."""

FIRST_ROWS = 20
"""The risk among fewer rows than these is noise, and does not set the limits of the axes."""


def risk_coverage_figure(
    curves: Mapping[str, tuple[Tensor, Tensor]],
    *,
    highlighted: Sequence[str] | None = None,
    risk: str | None = None,
    title: str = "",
) -> "Figure":
    """Risk among the most certain inputs against the share of inputs that is answered, zoomed to where the risk is.

    The worst of the grey lines are named where there is room.

    Args:
        curves: For each method its certainties [N], higher = answered first, and either whether each prediction is
            wrong (bool, the risk is the error rate) or the loss of each prediction [N], such as squared errors.
        highlighted: The methods that are drawn in colour, at most four; the others are grey. None: the first four.
        risk: The risk with its unit, for the axis. It is needed for losses.
        title: Heading of the figure.

    Raises:
        InputError: There is no method, one has no row, shapes differ, a value is NaN or infinite, losses have no ``risk``, errors and losses are
            mixed, or ``highlighted`` names an unknown method or more than four.

    Example:
        >>> figure = risk_coverage_figure({"softmax": (torch.tensor([0.9, 0.6]), torch.tensor([False, True]))})
        >>> figure.axes[0].get_ylabel()
        'Error rate (%)'
    """
    if not curves:
        raise InputError("`curves` is empty: it must hold at least one method.")
    is_error = {loss.dtype == torch.bool for _, loss in curves.values()}
    if len(is_error) > 1:
        raise InputError("`curves` must hold either errors (bool) for all methods or losses (floats) for all methods.")
    errors = is_error == {True}
    if not errors and risk is None:
        raise InputError("`risk` must say what the losses are and in which unit, such as 'Mean squared error (mm²)'.")

    points = {name: _curve(name, *curve) for name, curve in curves.items()}
    figure = new_figure(WIDTH, 3.2)
    axes, lines = figure.subplots(), {}
    start, low, high = _view(list(points.values()), from_zero=errors)
    scale = 100 if errors else 1
    axes.set_xlim(100 * start, 100)
    axes.set_ylim(scale * low, scale * high)
    for method, style in line_styles(list(curves), highlighted):
        coverage, value = points[method]
        shown = torch.linspace(0, len(value) - 1, min(MAX_POINTS, len(value))).round().long()
        # The risk among the first rows is noise: a line begins where it is in view, rather than at the edge.
        noise = (shown < _first_rows(len(value)) - 1) & ((value[shown] > high) | (value[shown] < low))
        drawn = value[shown].masked_fill(noise, torch.nan)
        (lines[method],) = axes.plot(100 * coverage[shown].numpy(), scale * drawn.numpy(), **style)
    others = [name for name, line in lines.items() if line.get_color() == FAINT]
    if len(others) > 1:
        _name_worst(axes, lines, others)
    axes.set(xlabel="Coverage (% answered, most certain first)", ylabel=risk or "Error rate (%)")
    heading(axes, title)
    methods_legend(figure, lines)
    return finish(figure)


def _curve(name: str, certainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and risk [N]; where rows are equally certain, the mean over their orders."""
    if certainty.ndim != 1 or certainty.shape != loss.shape or not len(loss):
        raise InputError(
            f"`curves[{name!r}]` must hold two tensors [N] with N > 0, but their shapes are {list(certainty.shape)} and "
            f"{list(loss.shape)}."
        )
    certainty, loss = to_float64(certainty).cpu(), to_float64(loss).cpu()
    if bool(certainty.isnan().any()) or not bool(loss.isfinite().all()):
        raise InputError(f"`curves[{name!r}]` has a certainty that is NaN, or a loss that is NaN or infinite.")
    rank = torch.arange(1, len(loss) + 1, dtype=torch.float64)
    return rank / len(loss), sparsification_curve(-certainty, loss).flip(0)


def _view(points: Sequence[tuple[Tensor, Tensor]], *, from_zero: bool) -> tuple[float, float, float]:
    """Where the coverage begins, and the limits of the risk: without the part where no method has any risk, and without spikes among the first rows."""
    final = max(float(value[-1]) for _, value in points)
    start, values = 1.0, []
    for coverage, value in points:
        below = (value < 0.05 * final).nonzero()  # from the last of them on, there is a risk
        start = min(start, float(coverage[below[-1, 0]]) if len(below) else 0.0)
    start = max(0.0, math.floor(20 * start - 1) / 20)
    for coverage, value in points:
        steady = torch.arange(len(value)) >= _first_rows(len(value)) - 1
        values += value[steady & (coverage >= start)].tolist()
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.01
    return start, low - margin if low > 0 else low, high + margin


def _first_rows(num_rows: int) -> int:
    return min(FIRST_ROWS, num_rows // 4)


def _name_worst(axes: Any, lines: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write the names of the worst of some lines above them, each where no other line or name is in the way."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    high += 0.1 * (high - low)  # for the name of the topmost line
    axes.set_ylim(low, high)
    height, gap = 0.09 * (high - low), 0.03 * (high - low)
    taken: list[tuple[float, float, float]] = []
    drawn = {name: (line.get_xdata(), line.get_ydata()) for name, line in lines.items()}
    drawn = {name: (x[y == y], y[y == y]) for name, (x, y) in drawn.items()}  # without the noise that is not drawn
    mean = {name: float(y[x >= left].mean()) for name, (x, y) in drawn.items() if name in names}
    for name in sorted(mean, key=lambda name: -mean[name])[:NAMED_LINES]:
        text, places = shortened(name), []
        width = 0.019 * len(text) * (right - left)
        for step in range(25):
            begin = left + step / 24 * (right - left - width)
            x, y = drawn[name]
            span = (x >= begin) & (x <= begin + width)
            if not span.any() or y[span].max() + height > high:
                continue
            bottom = float(y[span].max())
            others = [np.interp(x[span], *one) for other, one in drawn.items() if other != name]
            crossed = any(((one > y[span] - gap) & (one < bottom + height)).any() for one in others)
            covered = any(begin <= e and b <= begin + width and abs(bottom - other) <= height for b, e, other in taken)
            if not crossed and not covered:
                places.append((bottom - float(y[span].min()), begin, bottom))  # the flatter, the closer to its name
        if places:
            _, begin, bottom = min(places)
            taken.append((begin, begin + width, bottom))
            axes.annotate(text, (begin, bottom), (0, 2), textcoords="offset points", fontsize=9, color=GREY)
