"""The files that a comparison leaves in its directory: results.json, the page and the figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_uq.compare.drawing import draw
from lightning_uq.compare.page import make_report
from lightning_uq.compare.records import Record
from lightning_uq.report import render_html, to_png, to_svg, write_files

RESULTS = ("results.json", "report.html")
STALE = ("differences_*.png", "reliability_*.png", "scores_*.png", "risk_coverage.png", "intervals.png")


def write(results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], directory: Path) -> list[str]:
    """Write ``results.json``, ``report.html`` and the PNG figures into a directory: all of them, or none.

    Figures of an earlier comparison there are replaced.

    Args:
        results: The contents of ``results.json``.
        records: The records of its methods.
        directory: Where to write; it exists.

    Returns:
        The files' names.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    figures = draw(results, records)
    page = render_html(make_report(results, {name: to_svg(figure) for name, figure in figures.items()}))
    images = {f"{name}.png": to_png(figure) for name, figure in figures.items()}
    files = {"results.json": to_json(results), "report.html": page.encode(), **images}
    write_files(directory, files, stale=STALE)
    return list(files)


def write_results(results: Mapping[str, Any], directory: Path) -> None:
    """Write ``results.json`` alone, whole or not at all."""
    write_files(directory, {"results.json": to_json(results)})


def to_json(results: Mapping[str, Any]) -> bytes:
    """Results as the bytes of ``results.json``."""
    return (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()
