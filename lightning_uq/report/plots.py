"""Figures of a comparison. Each function makes a figure of its own: no window, no global state of matplotlib."""

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.functional import bin_statistics, risk_coverage_curve
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.standard_error import standard_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; line styles tell a second round of methods from the first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
IN_COLOR, OUT_COLOR, GREY = COLORS[0], COLORS[1], "#666666"

SCORE_LABELS = {
    "predictive_entropy": "Predictive entropy (nats)",
    "mutual_information": "Mutual information (nats)",
    "expected_entropy": "Expected entropy (nats)",
    "uncalibrated_mutual_information": "Mutual information before the calibration (nats)",
    "uncalibrated_expected_entropy": "Expected entropy before the calibration (nats)",
    "max_softmax": "1 - largest probability",
    "energy": "Energy",
    "max_logit": "- largest logit",
    "variation_ratio": "Variation ratio",
    "log_density": "- log density of the features",
    "mahalanobis": "Squared Mahalanobis distance",
    "relative_mahalanobis": "Relative Mahalanobis distance",
    "vacuity": "Vacuity",
}


def score_label(score: str) -> str:
    """What a score is called on an axis; every one is higher the more an input is out of distribution.

    Example:
        >>> score_label("max_logit"), score_label("my_score")
        ('- largest logit', 'my score')
    """
    return SCORE_LABELS.get(score, score.replace("_", " "))


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, drawn without a display.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Figures need matplotlib, which is not installed. Install the extra `report`: pip install 'lightning-uq[report]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def reliability_diagram(
    confidence: Tensor, correct: Tensor, *, title: str = "", note: str = "", num_bins: int = 15
) -> "Figure":
    """Accuracy against confidence, bin by bin with 95 % Wilson intervals, above the number of predictions in each bin.

    Args:
        confidence: Probability of the predicted class [N].
        correct: Whether that class was right [N].
        title: Heading of the figure.
        note: A line in the figure, such as the calibration error.
        num_bins: Number of equal-width bins.

    Raises:
        InputError: No prediction, or arrays of different shapes.

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
    count, hits, total = bin_statistics(confidence, correct, num_bins)
    used = count > 0
    centre = ((torch.arange(num_bins) + 0.5)[used] / num_bins).numpy()
    accuracy, mean_confidence = (hits / count)[used].numpy(), (total / count)[used].numpy()
    error = _wilson(accuracy, count[used].numpy())

    figure = new_figure(4.2, 4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 0.92 / num_bins
    top.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
    top.bar(centre, accuracy, width, color=IN_COLOR, alpha=0.75, label="Accuracy", zorder=2)
    top.errorbar(centre, accuracy, error, fmt="none", ecolor="black", elinewidth=0.8, capsize=2, zorder=3)
    top.plot(mean_confidence, mean_confidence, "D", color=OUT_COLOR, markersize=4, label="Mean confidence", zorder=4)
    top.set(ylabel="Accuracy", xlim=(0, 1), ylim=(0, 1.02), title=title)
    top.legend(
        loc="upper left",
        edgecolor="none",
        framealpha=0.8,
        fontsize=9,
        title=note or None,
        title_fontsize=9,
        alignment="left",
    )
    bottom.bar(centre, count[used].numpy(), width, color=GREY)
    bottom.set(xlabel="Confidence", ylabel="Inputs", yscale="log", ylim=(0.7, 1.5 * len(confidence)))
    _plain([top, bottom])
    return figure


def score_histogram(
    score_in: Tensor, score_out: Tensor, *, score: str, title: str = "", note: str = "", num_bins: int = 40
) -> "Figure":
    """Histograms of an out-of-distribution score on inputs in and out of distribution, each of area one.

    Args:
        score_in: Scores [N] of inputs in distribution.
        score_out: Scores [M] of inputs out of distribution.
        score: The score's name, for the axis.
        title: Heading of the figure.
        note: A line in the figure, such as the AUROC.
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
    figure = new_figure(4.2, 3.2)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for values, color, name in ((score_in, IN_COLOR, "In distribution"), (score_out, OUT_COLOR, "Out of distribution")):
        clipped = to_float64(values).cpu().clamp(edges[0], edges[-1]).numpy()
        settings: dict[str, Any] = {"bins": edges.numpy(), "density": True, "color": color}
        axes.hist(clipped, histtype="stepfilled", alpha=0.35, **settings)
        axes.hist(clipped, histtype="step", linewidth=1.5, label=name, **settings)
    axes.set(xlabel=score_label(score), ylabel="Density (square-root scale)", title=title)
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    # A confident network's scores pile up in one bin; on a linear scale nothing else would be seen.
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
    axes.set_ylim(0, 2.2 * axes.dataLim.y1)  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.legend(frameon=False, fontsize=9, title=note or None, title_fontsize=9, loc="upper center", ncols=2)
    _plain([axes])
    return figure


def risk_coverage_figure(curves: Mapping[str, tuple[Tensor, Tensor]]) -> "Figure":
    """Error rate among the most confident inputs, as a function of the share of inputs that is answered.

    Args:
        curves: For each method its confidences [N] and whether each prediction was wrong [N].

    Raises:
        InputError: No method.

    Example:
        >>> figure = risk_coverage_figure({"softmax": (torch.tensor([0.9, 0.6]), torch.tensor([False, True]))})
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'softmax'
    """
    if not curves:
        raise InputError("`curves` is empty: it must hold at least one method.")
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    first_error = 1.0
    for i, (method, (confidence, error)) in enumerate(curves.items()):
        coverage, risk = risk_coverage_curve(confidence, error)
        first_error = min([first_error, *coverage[risk > 0][:1].tolist()])
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}
        axes.plot(coverage.numpy(), 100 * risk.numpy(), label=method, linewidth=1.8, **style)
    axes.set(xlabel="Coverage (share of inputs answered, most confident first)", ylabel="Error rate (%)")
    # A good classifier's most confident answers hold no error: the axis starts shortly before the first one.
    axes.set(xlim=(max(0.0, math.floor(20 * first_error - 1) / 20), 1))
    axes.set_ylim(bottom=0)
    columns = 1 + (len(curves) - 1) // 14
    axes.legend(frameon=False, fontsize=9, ncols=columns, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    _plain([axes])
    return figure


def regret_figure(regret: Mapping[str, Tensor], *, title: str = "") -> "Figure":
    """Regret up to each step: the mean over runs, in a band of one standard error to either side.

    Args:
        regret: For each method the cumulative regret of its runs [S, T].
        title: Heading of the figure.

    Raises:
        InputError: No method, or one without a run.

    Example:
        >>> figure = regret_figure({"softmax": torch.tensor([[0.5, 0.7, 0.7], [0.1, 0.1, 0.2]])})
        >>> figure.axes[0].get_ylabel()
        'Cumulative regret (square-root scale)'
    """
    if not regret or any(runs.ndim != 2 or not runs.numel() for runs in regret.values()):
        raise InputError(
            f"`regret` must hold runs [S, T] of at least one method, but it holds "
            f"{ {method: list(runs.shape) for method, runs in regret.items()} }."
        )
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    for i, (method, runs) in enumerate(regret.items()):
        mean, step = runs.mean(0).numpy(), range(1, runs.shape[1] + 1)
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}
        axes.plot(step, mean, label=method, linewidth=1.8, **style)
        if len(runs) > 1:
            error = standard_errors(runs).numpy()
            axes.fill_between(step, (mean - error).clip(0), mean + error, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="Step", ylabel="Cumulative regret (square-root scale)", title=title)
    axes.set_xlim(1, max(2, *(runs.shape[1] for runs in regret.values())))
    # Agents that learn are hundreds of times better than chance: on a linear scale they would be one line.
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
    top = max(float(axes.dataLim.y1), 0.1)
    ticks = [base * 10.0**power for power in range(-4, 9) for base in (1, 2, 5)]
    axes.set_yticks([0, *(tick for tick in ticks if top / 100 <= tick <= top)])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylim(0, 1.05 * top)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    _plain([axes])
    return figure


def _wilson(share: Any, count: Any, z: float = 1.96) -> Any:
    """Distances [2, N] from a share of successes down and up to the ends of its Wilson interval."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [(share - centre + half).clip(0), (centre + half - share).clip(0)]


def _plain(axes: list[Any]) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
