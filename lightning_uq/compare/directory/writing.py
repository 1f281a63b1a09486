"""Writes a comparison's files into its directory: results.json, the page and the figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_uq.compare.pages.drawing import draw
from lightning_uq.compare.pages.page import make_report
from lightning_uq.compare.records import Record
from lightning_uq.report import Link, render_html, to_png, to_svg, write_files

PAGE = "report.html"
RESULTS = ("results.json", "report.html")
STALE = ("differences_*.png", "reliability_*.png", "scores_*.png", "risk_coverage.png", "intervals.png")


def write(results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], directory: Path) -> list[str]:
    """Write ``results.json``, ``report.html`` and the PNG figures into a directory: either all of them or none.

    Figures of an earlier comparison there are replaced.

    Args:
        results: The contents of ``results.json``.
        records: The records of its methods.
        directory: An existing directory.

    Returns:
        The files' names.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    return _write(directory, {"results.json": to_json(results), **make_pages(results, records)})


def write_page(
    results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], directory: Path, pages: Sequence[Link] = ()
) -> list[str]:
    """Write the files of :func:`write` except ``results.json``: the page and the figures of an existing run.

    Args:
        results: The contents of ``results.json``.
        records: The records of its methods.
        directory: An existing directory.
        pages: Links to other pages.

    Returns:
        The files' names.
    """
    return _write(directory, make_pages(results, records, pages))


def make_pages(
    results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], pages: Sequence[Link] = ()
) -> dict[str, bytes]:
    """The page and the figures, by file name."""
    figures = draw(results, records)
    report = make_report(results, {name: to_svg(figure) for name, figure in figures.items()})
    page = render_html(replace(report, pages=pages))
    return {PAGE: page.encode(), **{f"{name}.png": to_png(figure) for name, figure in figures.items()}}


def _write(directory: Path, files: Mapping[str, bytes]) -> list[str]:
    write_files(directory, files, stale=STALE)
    return list(files)


def write_results(results: Mapping[str, Any], directory: Path) -> None:
    """Write only ``results.json``, atomically."""
    write_files(directory, {"results.json": to_json(results)})


def to_json(results: Mapping[str, Any]) -> bytes:
    """Results as the bytes of ``results.json``."""
    return (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()
