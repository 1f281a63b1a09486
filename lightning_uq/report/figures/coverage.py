"""Coverage of central intervals at all levels: whether a regressor's intervals hold as much as they promise."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64
from lightning_uq.report.figures.drawing import (
    BAND,
    GREY,
    WIDTH,
    finish,
    heading,
    line_styles,
    methods_legend,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def coverage_figure(
    coverage: Mapping[str, Tensor],
    levels: Tensor,
    *,
    num_rows: int,
    highlighted: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """Observed coverage of central intervals against their nominal level, with a band for calibrated intervals.

    Args:
        coverage: For each method the observed coverage [L] of its central intervals, as shares.
        levels: The nominal levels [L], increasing, in (0, 1).
        num_rows: Number of different test rows behind a coverage. The band holds the coverage of calibrated intervals
            on that many independent rows with a probability of 95 %, at each level.
        highlighted: The methods that are drawn in colour, at most four; the others are grey. None: the first four.
        title: Heading of the figure.

    Raises:
        InputError: There is no method, shapes differ, a share or level is out of range, ``num_rows`` is below 1, or
            ``highlighted`` names an unknown method or more than four.

    Example:
        >>> figure = coverage_figure({"gaussian": torch.tensor([0.48, 0.93])}, torch.tensor([0.5, 0.9]), num_rows=200)
        >>> figure.axes[0].get_xlabel()
        'Nominal level (%)'
    """
    levels = to_float64(levels).cpu()
    if levels.ndim != 1 or not len(levels) or not bool(((levels > 0) & (levels < 1)).all() & (levels.diff() > 0).all()):
        raise InputError("`levels` must have the shape [L] with L > 0 and increase within (0, 1).")
    if not coverage:
        raise InputError("`coverage` is empty: it must hold at least one method.")
    if num_rows < 1:
        raise InputError(f"`num_rows` must be at least 1, but it is {num_rows}.")
    for name, values in coverage.items():
        if values.shape != levels.shape or not bool(((values >= 0) & (values <= 1)).all()):
            raise InputError(
                f"`coverage[{name!r}]` must have the shape {list(levels.shape)} and values in [0, 1], but its shape is "
                f"{list(values.shape)} or a value is out of range."
            )
    figure = new_figure(WIDTH, 3.4)
    axes, lines = figure.subplots(), {}
    low, high = torch.tensor([binomial_band(num_rows, level) for level in levels.tolist()]).T
    x = 100 * levels.numpy()
    axes.fill_between(x, 100 * low.numpy(), 100 * high.numpy(), color=BAND, linewidth=0)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1.2, linestyle="--", zorder=2)
    for method, style in line_styles(list(coverage), highlighted):
        (lines[method],) = axes.plot(x, 100 * to_float64(coverage[method]).cpu().numpy(), **style)
    axes.set(xlabel="Nominal level (%)", ylabel="Observed coverage (%)", xlim=(0, 100), ylim=(0, 102))
    note = f"Dashed: calibrated. Band: 95 % of calibrated models on {num_rows:,} rows. Below it: intervals too narrow."
    heading(axes, title, [note])
    methods_legend(figure, lines)
    return finish(figure, grid="both")


def binomial_band(count: int, share: float) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the share of successes among ``count`` rows, each a success with probability ``share``.

    They are exact up to tails of eight standard deviations, so that a large count costs little.

    Example:
        >>> binomial_band(10, 0.5)
        (0.2, 0.8)
    """
    reach = 8 * math.sqrt(count * share * (1 - share)) + 20
    k = torch.arange(max(0, math.floor(count * share - reach)), min(count, math.ceil(count * share + reach)) + 1)
    k, n = k.double(), torch.tensor(float(count), dtype=torch.float64)
    log_ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (log_ways + k * math.log(share) + (n - k) * math.log1p(-share)).exp().cumsum(0)
    low, high = (
        torch.searchsorted(below, torch.tensor([0.025, 0.975], dtype=torch.float64)).clamp(max=len(k) - 1).tolist()
    )
    return float(k[low]) / count, float(k[high]) / count
