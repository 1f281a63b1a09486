"""Histograms of an out-of-distribution score."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64
from lightning_uq.report.figures.drawing import (
    IN_COLOR,
    OUT_COLOR,
    WIDTH,
    finish,
    heading,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE_LABELS = {
    "predictive_entropy": "Predictive entropy (nats)",
    "mutual_information": "Mutual information (nats)",
    "expected_entropy": "Expected entropy (nats)",
    "uncalibrated_mutual_information": "Mutual information before the calibration (nats)",
    "uncalibrated_expected_entropy": "Expected entropy before the calibration (nats)",
    "max_softmax": "1 - largest probability",
    "energy": "Energy",
    "max_logit": "− largest logit",
    "variation_ratio": "Variation ratio",
    "log_density": "− log density of the features",
    "mahalanobis": "Squared Mahalanobis distance",
    "relative_mahalanobis": "Relative Mahalanobis distance",
    "vacuity": "Vacuity",
}


def score_label(score: str) -> str:
    """What a score is called on an axis; every one is higher the more an input is out of distribution.

    Example:
        >>> score_label("max_logit"), score_label("my_score")
        ('− largest logit', 'my score')
    """
    return SCORE_LABELS.get(score, score.replace("_", " "))


def score_histogram(
    score_in: Tensor, score_out: Tensor, *, score: str, title: str = "", note: str = "", num_bins: int = 40
) -> "Figure":
    """Histograms of an out-of-distribution score on inputs in and out of distribution, each of area one.

    Args:
        score_in: Scores [N] of inputs in distribution.
        score_out: Scores [M] of inputs out of distribution.
        score: The score's name, for the axis.
        title: Heading of the figure.
        note: A line under the heading, such as the AUROC.
        num_bins: Number of bins over the range that holds 99% of the scores; the rest is counted in the end bins.

    Raises:
        InputError: No score on one side, or one that is not finite.

    Example:
        >>> figure = score_histogram(torch.rand(9), 1 + torch.rand(9), score="predictive_entropy")
        >>> figure.axes[0].get_xlabel()
        'Predictive entropy (nats)'
    """
    for name, values in (("score_in", score_in), ("score_out", score_out)):
        if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
            raise InputError(
                f"`{name}` must hold finite scores [N] with N > 0, but its shape is {list(values.shape)} or a score is not finite."
            )
    both = to_float64(torch.cat([score_in, score_out]))
    # quantile() stops at 16 million elements; a sort does not.
    ordered = both.sort().values
    low, high = ordered[int(0.005 * (len(both) - 1))], ordered[-1 - int(0.005 * (len(both) - 1))]
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(float(low), float(high), num_bins + 1, dtype=torch.float64)
    figure = new_figure(WIDTH, 2.8)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    outlines: list[Any] = []
    for values, color, line, name in (
        (score_in, IN_COLOR, "-", "In distribution"),
        (score_out, OUT_COLOR, (0, (3, 1)), "Out of distribution"),
    ):
        clipped = to_float64(values).cpu().clamp(edges[0], edges[-1]).numpy()
        settings: dict[str, Any] = {"bins": edges.numpy(), "density": True, "color": color}
        axes.hist(clipped, histtype="stepfilled", alpha=0.3, **settings)
        drawn: Any = axes.hist(clipped, histtype="step", linewidth=1.6, linestyle=line, label=name, **settings)[2]
        outlines += drawn
    axes.set(xlabel=score_label(score), ylabel="Density (square-root scale)")
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    # A confident network's scores pile up in one bin; on a linear scale nothing else would be seen.
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    heading(axes, title, [note])
    legend_below(figure, outlines)
    return finish(figure)
