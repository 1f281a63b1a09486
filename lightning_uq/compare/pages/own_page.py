"""The texts on the page of a user's own module."""

from collections.abc import Mapping
from typing import Any

from lightning_uq.report import Column


def introduction(results: Mapping[str, Any]) -> list[str]:
    """The paragraphs before the table."""
    problem, rows = results["problem"], results["rows"]
    sizes = problem["sizes"]
    tested = "1 module" if len(rows) == 1 else f"{len(rows)} modules"
    text = f"{tested} tested on {problem['name']}: {sizes['test']:,} rows"
    if sizes["ood"]:
        loaders = ", ".join(f"{name} ({size:,} rows)" for name, size in problem["ood"].items())
        text += f", and {sizes['ood']:,} out-of-distribution (OOD) rows: {loaders}"
    parts = [f"{text}."]
    if problem.get("calibrated_by"):
        parts.append(f"The predictions were calibrated by {' and '.join(problem['calibrated_by'])}.")
    if problem["kept"] < sizes["test"]:
        parts.append(
            f"All numbers are from a random sample of {problem['kept']:,} of the {sizes['test']:,} test rows (`max_rows`)."
        )
    return parts


def notes(results: Mapping[str, Any]) -> list[str]:
    """The caveats below the table."""
    keys, sizes = {key for row in results["rows"] for key in row}, results["problem"]["sizes"]
    is_joined = bool(results["differences"])
    found = [
        "A module is tied with the best one if the interval of their difference contains 0. With a probability of 95 %, the truly best one is marked as the best or "
        "as tied."
        if is_joined
        else "The intervals are over test rows, at 95 %. They show how well these rows determine a number of this trained module. Another training may "
        "differ by more."
    ]
    if "ece" in keys:
        found.append(
            f"The calibration error is the plug-in estimate, which is above zero even for a perfect model: with {sizes['test']:,} test rows "
            "differences of a few thousandths are meaningless."
        )
    if sizes["ood"]:
        found.append(
            "OOD numbers hold only for these data. Choose a score before seeing such data. Average precision depends on the share of OOD rows, here "
            f"{100 * sizes['ood'] / (sizes['ood'] + sizes['test']):.0f} %."
        )
    return found


def cell_notes(results: Mapping[str, Any], column: Column) -> dict[str, str]:
    """For each module, the interval of its number, in words."""
    return {
        name: f"[{column.text(lower)}, {column.text(upper)}]"
        for name, (lower, upper) in results.get("intervals", {}).get(column.key, {}).items()
    }
