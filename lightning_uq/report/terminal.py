"""The comparison's table on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_uq.report.table import Column, Row, best_methods, cell, shown_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_table(rows: Sequence[Row], console: "Console", title: str = "") -> None:
    """Print the rows as one table, or, where the console is too narrow for it, as few tables of whole groups of columns.

    Example:
        >>> from rich.console import Console
        >>> rows = [{"method": "softmax", "nll": {"mean": 0.25, "se": 0.01}}]
        >>> print_table(rows, Console(width=40))  # doctest: +NORMALIZE_WHITESPACE
        Method      NLL
        ───────────────
        softmax   0.250
                 ±0.010
    """
    shown = shown_columns(rows)
    tables: list[list[Column]] = []
    for group in dict.fromkeys(column.group for column in shown):
        columns = [column for column in shown if column.group == group]
        joined = [*tables[-1], *columns] if tables else columns
        width = console.measure(make_table(rows, joined), options=console.options.update_width(1000)).maximum
        if tables and width <= console.width:
            tables[-1] = joined
        else:
            tables.append(columns)
    for columns in tables:
        console.print(make_table(rows, columns, title))


def make_table(rows: Sequence[Row], columns: Sequence[Column], title: str = "") -> "Table":
    """A table of these columns: a mean above its standard error, the best means bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("Method", no_wrap=True)
    for column in columns:
        table.add_column(column.label, justify="right", no_wrap=True)
    best = {column.key: best_methods(rows, column) for column in columns}
    for row in rows:
        cells = [Text(row["method"])]
        for column in columns:
            mean, error = cell(row, column)
            text = Text(mean, style="bold" if row["method"] in best[column.key] else "")
            cells.append(text.append(f"\n{error}", style="dim not bold") if error else text)
        table.add_row(*cells)
    return table
