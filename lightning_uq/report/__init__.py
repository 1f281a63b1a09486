"""Figures, tables as text, and the HTML report: plain data in, documents out."""

from lightning_uq.report.figures import (
    COLORS,
    GREY,
    coverage_figure,
    difference_figure,
    new_figure,
    regret_figure,
    reliability_diagram,
    risk_coverage_figure,
    score_histogram,
    score_label,
    to_png,
    to_svg,
)
from lightning_uq.report.files import writable_directory, write_files
from lightning_uq.report.formats import Format, csv_table, format_table, latex_table, markdown_table
from lightning_uq.report.html import Link, Report, Section, jinja_environment, render_html
from lightning_uq.report.table import (
    COLUMNS,
    DENSITY_TITLES,
    LABEL_TITLES,
    RESULT_KEYS,
    Column,
    best_methods,
    cell,
    marks,
    shown_columns,
)
from lightning_uq.report.terminal import print_table

__all__ = [
    "COLORS",
    "COLUMNS",
    "DENSITY_TITLES",
    "GREY",
    "LABEL_TITLES",
    "RESULT_KEYS",
    "Column",
    "Format",
    "Link",
    "Report",
    "Section",
    "best_methods",
    "cell",
    "coverage_figure",
    "csv_table",
    "difference_figure",
    "format_table",
    "jinja_environment",
    "latex_table",
    "markdown_table",
    "marks",
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
    "to_svg",
    "writable_directory",
    "write_files",
]
