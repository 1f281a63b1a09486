"""The comparison's table on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_uq.report.table import Column, Row, Tied, cell, marks, shown_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BEST = "•"
"""Stands before the best mean where there is no bold type."""


def print_table(
    rows: Sequence[Row],
    console: "Console",
    title: str = "",
    tied: Tied | None = None,
    columns: Sequence[Column] | None = None,
) -> None:
    """Print the rows as one table. On a narrow console, they become several tables, of whole groups of columns where these fit.

    Args:
        rows: The rows.
        console: Where to print.
        title: Stands above the table.
        tied: For each key the methods that cannot be distinguished from the best; they are marked with ``*``. The best means are bold; where the console
            has no bold type, as a pipe has none, they are marked with ``•``.
        columns: The columns; None: those of :func:`~lightning_uq.report.table.shown_columns`.

    Example:
        >>> from rich.console import Console
        >>> rows = [{"method": "softmax", "nll": {"mean": 0.25, "se": 0.01}}]
        >>> print_table(rows, Console(width=40))  # doctest: +NORMALIZE_WHITESPACE
        Method      NLL
        ───────────────
        softmax   0.250
                 ±0.010
    """
    shown = shown_columns(rows) if columns is None else columns
    sign = "" if console.color_system else BEST

    def fits(columns: Sequence[Column]) -> bool:
        options = console.options.update_width(10_000)
        return (
            console.measure(make_table(rows, columns, tied=tied, best_sign=sign), options=options).maximum
            <= console.width
        )

    tables: list[list[Column]] = []
    for group in dict.fromkeys(column.group for column in shown):
        part = [column for column in shown if column.group == group]
        # A group stays whole where it can: values that do not fit would be cut off.
        for columns_together in [part] if fits(part) else [[column] for column in part]:
            if tables and fits([*tables[-1], *columns_together]):
                tables[-1] += columns_together
            else:
                tables.append(columns_together)
    for part in tables:
        console.print(make_table(rows, part, title, tied, best_sign=sign))
    found = set(marks(rows, shown, tied).values())
    legend = {"best": f"{sign or 'bold'}: best mean", "tied": "*: cannot be distinguished from the best"}
    if found:
        console.print("; ".join(text for mark, text in legend.items() if mark in found), highlight=False)


def make_table(
    rows: Sequence[Row], columns: Sequence[Column], title: str = "", tied: Tied | None = None, best_sign: str = ""
) -> "Table":
    """A table of these columns: a mean above its standard error, the best means bold and after ``best_sign``, tied ones after ``*``."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("Method", no_wrap=True)
    for column in columns:
        table.add_column(column.label, justify="right", no_wrap=True)
    marked = marks(rows, columns, tied)
    for row in rows:
        cells = [Text(row["method"])]
        for column in columns:
            mean, error = cell(row, column)
            mark = marked.get((row["method"], column.key))
            sign = {"tied": "*", "best": best_sign, None: ""}[mark]
            text = Text(sign + mean, style="bold" if mark == "best" else "")
            cells.append(text.append(f"\n{error}", style="dim not bold") if error else text)
        table.add_row(*cells)
    return table
