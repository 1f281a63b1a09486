"""Active learning: accuracy over the number of labels, and the share of ambiguous samples, from the published results."""

import json
from pathlib import Path
from statistics import mean, stdev

from docs.figures import style

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "reproduce" / "published" / "active.json"
PANELS = (
    ("mnist", "accuracy", "MNIST: accuracy, %"),
    ("dirty_mnist", "accuracy", "Dirty-MNIST: accuracy, %"),
    ("dirty_mnist", "ambiguous", "ambiguous labels, %"),
)
LINES = {
    "random": (":", style.GREY),
    "softmax entropy": ("-", style.BLUE),
    "density": ("-", style.ORANGE),
    "ensemble entropy": ("--", style.YELLOW),
    "ensemble MI": ("-.", style.PINK),
}


def draw():
    """Draw the mean of each score over its seeds, with a band of one standard error."""
    results = json.loads(PUBLISHED.read_text())["results"]
    figure, panels = style.panels(3, height=3.2)
    for axes, (data, key, title) in zip(panels, PANELS, strict=True):
        for label, (line, colour) in LINES.items():
            runs = [result for job, result in results.items() if job.startswith(data) and job.endswith(f"-{label}")]
            if not runs:  # left out by the budget
                continue
            columns = [[100 * value for value in values] for values in zip(*(run[key] for run in runs), strict=True)]
            labels = runs[0]["labels"]
            centre = [mean(values) for values in columns]
            error = [stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0 for values in columns]
            axes.plot(labels, centre, line, color=colour, label=label)
            low, high = ([c + sign * e for c, e in zip(centre, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(labels, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="labels", title=title)
        axes.grid(alpha=0.25)
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    shown = [label for label in LINES if label in lines]  # a panel may lack one
    figure.legend([lines[label] for label in shown], shown, loc="outside lower center", ncols=3)
    return figure
