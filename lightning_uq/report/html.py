"""The report: one HTML file that needs nothing beside it, on a screen, a phone or paper."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.report.table import Column, Row, Tied, cell, marks, shown_columns

if TYPE_CHECKING:
    from jinja2 import Environment

GROUPS = {
    "prediction": "Prediction",
    "sets": "Sets of classes",
    "intervals": "Intervals",
    "testbed": "Neural Testbed",
    "detection": "OOD detection",
    "cost": "Cost",
}


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        title: The heading.
        text: What the figures show.
        figures: Figures from :func:`~lightning_uq.report.to_svg` by what a screen reader calls them; their titles are in the figures.
    """

    title: str
    text: str
    figures: Mapping[str, str]


@dataclass(frozen=True)
class Link:
    """A link to another page of the report.

    Attributes:
        text: The text of the link.
        href: Address of the page, usually the name of a file beside this one.
        note: A sentence on that page, such as its verdict. Links with notes are shown as cards.
    """

    text: str
    href: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a page holds. All fields are plain data; every text is escaped when it is rendered.

    Attributes:
        title: Heading of the page.
        verdict: Sentences that stand first: which method, on which condition. The first is the largest.
        introduction: Paragraphs before the table.
        rows: The table's rows, as in ``results.json``; a page without rows has no table.
        columns: The table's columns; None: those of :func:`~lightning_uq.report.shown_columns`.
        tied: For each key the methods that cannot be distinguished from the best; None: unknown, and nothing is marked.
        intervals: For each key a note on a method's value, such as ``+0.012 [0.003, 0.021] to softmax``.
        methods: For each method what it is in one line, and a link to its source or None.
        notes: Caveats, shown below the table.
        sections: The figures.
        facts: Tables of names and values by their heading: the configuration, the versions.
        pages: Links to the other pages of the report.
    """

    title: str
    verdict: Sequence[str] = ()
    introduction: Sequence[str] = ()
    rows: Sequence[Row] = ()
    columns: Sequence[Column] | None = None
    tied: Tied = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    methods: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pages: Sequence[Link] = ()


def jinja_environment() -> "Environment":
    """The environment in which the page is rendered.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError(
            "The HTML report needs jinja2, which is not installed. Install the extra `report`: "
            "pip install 'lightning-uq[report]'."
        ) from error
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


def render_html(report: Report) -> str:
    """The report as one HTML document: the figures are inside, and nothing is loaded from elsewhere.

    Raises:
        InputError: A sequence of texts is a single string, a figure is no SVG, a link is neither relative nor http(s), or
            ``tied`` or ``intervals`` name a method that has no row.
        MissingExtraError: jinja2 is not installed.

    Example:
        >>> page = render_html(Report("A < B", rows=[{"method": "<b>", "nll": {"mean": 0.5, "se": None}}]))
        >>> "A &lt; B" in page, "&lt;b&gt;" in page, "<b>" in page
        (True, True, False)
    """
    environment = jinja_environment()
    _check(report)
    columns = list(shown_columns(report.rows) if report.columns is None else report.columns)
    marked = marks(report.rows, columns, report.tied)
    anchors = {name: f"method-{i + 1}" for i, name in enumerate(report.methods)}
    rows = [
        {
            "method": row["method"],
            "anchor": anchors.get(row["method"]),
            "cells": [_cell(row, column, marked, report.intervals) for column in columns],
        }
        for row in report.rows
    ]
    groups = [
        {"name": GROUPS[group], "size": len(list(members))}
        for group, members in itertools.groupby(column.group for column in columns)
    ]
    source = files("lightning_uq.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=report.title,
        verdict=report.verdict,
        introduction=report.introduction,
        columns=columns,
        groups=groups,
        starts=list(itertools.accumulate((group["size"] for group in groups), initial=0)) if len(groups) > 1 else [],
        arrows={"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", None: ""},
        rows=rows,
        has_errors=any(cell["se"] for row in rows for cell in row["cells"]),
        has_ties="tied" in marked.values(),
        has_intervals=any(cell["note"] for row in rows for cell in row["cells"]),
        notes=report.notes,
        sections=[_section(section) for section in report.sections],
        methods=[
            {"name": name, "text": text, "href": href, "anchor": anchors[name]}
            for name, (text, href) in report.methods.items()
        ],
        fact_tables=report.facts,
        pages=report.pages,
    )


def _check(report: Report) -> None:
    for name in ("verdict", "introduction", "notes"):
        if isinstance(getattr(report, name), str):
            raise InputError(f"`{name}` must be a list of texts, but it is a single text. Put it into a list.")
    for href in [*(page.href for page in report.pages), *(href for _, href in report.methods.values())]:
        if href is not None and urlsplit(href).scheme not in ("", "http", "https"):
            raise InputError(f"A link must be relative or begin with http:// or https://, but it is {href!r}.")
    names = {row["method"] for row in report.rows}
    for key, notes in report.intervals.items():
        unknown = sorted(set(notes) - names)
        if unknown:
            raise InputError(f"`intervals[{key!r}]` names methods that have no row: {', '.join(unknown)}.")


def _cell(row: Row, column: Column, marked: Mapping[tuple[str, str], str], intervals: Mapping[str, Any]) -> Any:
    mean, error = cell(row, column)
    value = None if mean == "-" else row[column.key]["mean"]
    name = row["method"]
    note = intervals.get(column.key, {}).get(name, "")
    return {"mean": mean, "se": error, "value": value, "mark": marked.get((name, column.key)), "note": note}


def _section(section: Section) -> dict[str, Any]:
    from markupsafe import Markup, escape

    figures = []
    for caption, svg in section.figures.items():
        if not svg.startswith("<svg "):
            raise InputError(
                f"The figure {caption!r} must be an SVG element from `to_svg`, but it begins with {svg[:20]!r}."
            )
        label = f'<svg role="img" aria-label="{escape(caption)}" '
        figures.append(Markup(label + svg.removeprefix("<svg ")))
    return {"title": section.title, "text": section.text, "figures": figures}
