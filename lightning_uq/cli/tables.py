"""The table and the verdict of a run, as commands print them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

TableFormat = Literal["terminal", "markdown", "latex", "csv"]


def print_results(results: Mapping[str, Any], format: TableFormat, console: "Console") -> None:
    """Print the rows of ``results.json`` as a table, on a terminal with the verdict below it."""
    from lightning_uq.compare.pages.page import ties
    from lightning_uq.report import format_table, print_table

    if format == "terminal":
        print_table(results["rows"], console, tied=ties(results))
        for sentence in results["verdict"]:
            console.print(sentence, highlight=False, soft_wrap=True)
    else:
        table = format_table(results["rows"], format, ties(results))
        console.print(table, highlight=False, soft_wrap=True, markup=False)
