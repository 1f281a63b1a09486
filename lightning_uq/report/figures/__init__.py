"""The report's figures. Each function makes a figure of its own: no window, no global state of matplotlib."""

from lightning_uq.report.figures.coverage import coverage_figure
from lightning_uq.report.figures.differences import difference_figure
from lightning_uq.report.figures.drawing import COLORS, GREY, new_figure, to_png, to_svg
from lightning_uq.report.figures.learning import learning_figure
from lightning_uq.report.figures.regret import regret_figure
from lightning_uq.report.figures.reliability import reliability_diagram
from lightning_uq.report.figures.risk_coverage import risk_coverage_figure
from lightning_uq.report.figures.scores import score_histogram, score_label

__all__ = [
    "COLORS",
    "GREY",
    "coverage_figure",
    "difference_figure",
    "learning_figure",
    "new_figure",
    "regret_figure",
    "reliability_diagram",
    "risk_coverage_figure",
    "score_histogram",
    "score_label",
    "to_png",
    "to_svg",
]
