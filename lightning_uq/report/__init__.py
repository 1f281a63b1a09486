"""Plots, the table's columns and the HTML report."""

from lightning_uq.report.files import writable_directory, write_files
from lightning_uq.report.html import Report, Section, jinja_environment, render_html
from lightning_uq.report.plots import (
    new_figure,
    regret_figure,
    reliability_diagram,
    risk_coverage_figure,
    score_histogram,
    score_label,
    to_png,
)
from lightning_uq.report.table import COLUMNS, RESULT_KEYS, Column, best_methods, cell, markdown_table, shown_columns
from lightning_uq.report.terminal import print_table

__all__ = [
    "COLUMNS",
    "RESULT_KEYS",
    "Column",
    "Report",
    "Section",
    "best_methods",
    "cell",
    "jinja_environment",
    "markdown_table",
    "new_figure",
    "print_table",
    "regret_figure",
    "reliability_diagram",
    "render_html",
    "risk_coverage_figure",
    "score_histogram",
    "score_label",
    "shown_columns",
    "to_png",
    "writable_directory",
    "write_files",
]
