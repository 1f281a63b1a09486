"""The table of an evaluation on a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_uq.evaluate.names import AFTER, quantities

if TYPE_CHECKING:
    from rich.table import Table


def make_table(result: Mapping[str, Any]) -> "Table":
    """The numbers before and after temperature scaling, each as mean and standard error over runs.

    Args:
        result: What :func:`~lightning_uq.evaluate.evaluate` returned.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def text(name: str) -> str:
        if name not in result["mean"]:
            return ""
        mean, error = result["mean"][name], result["se"][name]
        return f"{mean:.4f}" if error is None else f"{mean:.4f} ±{error:.4f}"

    number = len(result["info"]["runs"])
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(f"{number} run{'s' if number > 1 else ''}", no_wrap=True)
    for heading in ("As trained", "Temperature-scaled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in quantities(result["info"]["model_type"]):
        if one.name not in result["mean"]:  # detection metrics need out-of-distribution data
            continue
        table.add_row(one.label, text(one.name), text(f"{one.name}{AFTER}"))
    found = [value for run in result["info"]["temperature"] for value in run]
    span = f"{min(found):.3f}" if len(found) == 1 else f"{min(found):.3f} to {max(found):.3f}"
    table.add_row("Temperature", "", span)
    return table
