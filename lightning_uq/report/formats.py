"""The rows as text for other programs: Markdown, LaTeX, CSV."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Literal

from lightning_uq.errors import InputError
from lightning_uq.report.table import MINUS, Column, Row, Tied, cell, marks, shown_columns

Format = Literal["markdown", "latex", "csv"]


def format_table(
    rows: Sequence[Row], format: Format, tied: Tied | None = None, columns: Sequence[Column] | None = None
) -> str:
    """The rows as a table in one of the text formats.

    Args:
        rows: The rows.
        format: ``markdown``, ``latex`` or ``csv``.
        tied: For each key the methods that cannot be distinguished from the best; CSV, which holds numbers alone, ignores it.
        columns: The columns; None: those of :func:`~lightning_uq.report.table.shown_columns`.

    Raises:
        InputError: The format is unknown, or ``tied`` names a method that has no row.

    Example:
        >>> print(format_table([{"method": "softmax", "nll": {"mean": 0.25, "se": 0.01}}], "markdown"))
        | method | NLL |
        |---|---:|
        | softmax | 0.250 ±0.010 |
    """
    if format not in _FORMATS:
        raise InputError(f"`format` must be markdown, latex or csv, but it is {format!r}.")
    return _FORMATS[format](rows, tied, columns)


def markdown_table(rows: Sequence[Row], tied: Tied | None = None, columns: Sequence[Column] | None = None) -> str:
    """The rows as a table in Markdown: the best means are bold, and ≈ marks the methods that are tied with them.

    Example:
        >>> rows = [{"method": name, "nll": {"mean": mean, "se": None}} for name, mean in (("a", 0.2), ("b", 0.3))]
        >>> print(markdown_table(rows, {"nll": {"a", "b"}}))
        | method | NLL |
        |---|---:|
        | a | **0.200** |
        | b | 0.300 ≈ |
        <BLANKLINE>
        Bold: best mean. ≈: cannot be distinguished from the best.
    """
    columns = shown_columns(rows) if columns is None else columns
    marked = marks(rows, columns, tied)
    labels = [_markdown(column.label) for column in columns]
    lines = ["| method | " + " | ".join(labels) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            mean, error = cell(row, column)
            mark = marked.get((row["method"], column.key))
            mean = f"**{mean}**" if mark == "best" else mean
            cells.append(" ".join(part for part in (mean, error, "≈" if mark == "tied" else "") if part))
        lines.append(f"| {_markdown(row['method'])} | " + " | ".join(cells) + " |")
    if "tied" in marked.values():
        lines += ["", "Bold: best mean. ≈: cannot be distinguished from the best."]
    return "\n".join(lines)


def latex_table(rows: Sequence[Row], tied: Tied | None = None, columns: Sequence[Column] | None = None) -> str:
    r"""The rows as a LaTeX ``tabular`` for the package booktabs; best means are bold, and tied ones have a superscript.

    Example:
        >>> print(latex_table([{"method": "max_logit", "nll": {"mean": 0.25, "se": 0.01}}]))
        % Needs \usepackage{booktabs}.
        \begin{tabular}{lr}
        \toprule
        Method & NLL $\downarrow$ \\
        \midrule
        max\_logit & 0.250 {\scriptsize $\pm$0.010} \\
        \bottomrule
        \end{tabular}
    """
    columns = shown_columns(rows) if columns is None else columns
    marked = marks(rows, columns, tied)
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", None: ""}
    header = ["Method", *(_latex(column.label) + arrows[column.better] for column in columns)]
    lines = [r"% Needs \usepackage{booktabs}."]
    if "tied" in marked.values():
        lines.append(r"% Bold: best mean. $\approx$: cannot be distinguished from the best.")
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", " & ".join(header) + r" \\", r"\midrule"]
    for row in rows:
        cells = [_latex(row["method"])]
        for column in columns:
            mean, error = cell(row, column)
            mark = marked.get((row["method"], column.key))
            text = "--" if mean == "-" else _latex(mean)
            text = rf"\textbf{{{text}}}" if mark == "best" else text
            text += r"$^{\approx}$" if mark == "tied" else ""
            cells.append(text + (rf" {{\scriptsize $\pm${_latex(error[1:])}}}" if error else ""))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def csv_table(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> str:
    """The rows as CSV in full precision: for each column its mean, its standard error and the number of seeds.

    A number that is missing is an empty field.

    Example:
        >>> print(csv_table([{"method": "softmax", "nll": {"mean": 0.25, "se": 0.01, "seeds": [0.24, 0.26]}}]), end="")
        method,nll_mean,nll_se,nll_seeds
        softmax,0.25,0.01,2
    """
    columns = shown_columns(rows) if columns is None else columns
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *(f"{column.key}_{part}" for column in columns for part in ("mean", "se", "seeds"))])
    for row in rows:
        fields = [row["method"]]
        for column in columns:
            value = row.get(column.key, {})
            seeds = value.get("seeds")
            fields += [value.get("mean"), value.get("se"), None if seeds is None else len(seeds)]
        writer.writerow(fields)
    return text.getvalue()


_FORMATS: dict[str, Callable[[Sequence[Row], Tied | None, Sequence[Column] | None], str]] = {
    "markdown": markdown_table,
    "latex": latex_table,
    "csv": lambda rows, tied, columns: csv_table(rows, columns),
}

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    MINUS: "$-$",
    **{character: "\\" + character for character in "{}$&#_%"},
}


def _latex(text: str) -> str:
    r"""Escaped; a bracket at the beginning would be read as an argument of the ``\\`` or rule before it."""
    escaped = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(text.split()))
