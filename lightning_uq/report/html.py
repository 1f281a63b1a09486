"""The report: one HTML file that needs nothing beside it, on a screen, a phone or paper."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_uq.errors import MissingExtraError
from lightning_uq.report.table import Row, best_methods, cell, shown_columns

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light; }
  body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 0 auto; padding: 1rem; }
  h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
  h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
  p, li { max-width: 48rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
  th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; vertical-align: top; }
  th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
  thead th { border-bottom: 2px solid #444; }
  .better, .se { display: block; font-size: .75rem; font-weight: normal; color: #666; }
  .best { font-weight: 700; }
  .facts th, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; position: static; }
  .facts th { white-space: nowrap; font-weight: normal; color: #555; }
  .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
  figure { margin: 0; break-inside: avoid; }
  img { width: 100%; height: auto; }
  .single { max-width: 46rem; }
  dl { font-size: .9rem; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; max-width: 48rem; }
  dt { font-weight: 600; } dd { margin: 0; }
  @media print {
    @page { size: A4 landscape; margin: 12mm; }
    body { max-width: none; padding: 0; font-size: 10pt; }
    table, dl { font-size: 7.5pt; } th, td { padding: 1mm 1.2mm; }
    .se, .better { font-size: 6pt; }
    h2, h2 + p { break-after: avoid; } tr { break-inside: avoid; }
    .single { max-width: 170mm; }
    .wide { overflow: visible; }
    .grid { grid-template-columns: repeat(3, 1fr); }
  }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for paragraph in introduction %}<p>{{ paragraph }}</p>
{% endfor %}
<h2>Results</h2>
<div class="wide"><table id="results">
<thead><tr><th scope="col">Method</th>
{%- for column in columns %}<th scope="col" title="{{ column.title }}">{{ column.label }}<span class="better">{{ {"higher": "↑", "lower": "↓"}.get(column.better, "") }}</span></th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in rows %}<tr><td>{{ row.method }}</td>
{%- for mean, se, best in row.cells %}<td{% if best %} class="best"{% endif %}>{{ mean }}{% if se %}<span class="se">{{ se }}</span>{% endif %}</td>{% endfor -%}
</tr>
{% endfor %}</tbody>
</table></div>
<p>{{ "Mean and standard error over seeds" if has_errors else "Values of one seed" }}; the best mean of a column is bold. ↑: higher is better, ↓: lower is better.</p>
<dl>{% for column in columns %}<dt>{{ column.label }}</dt><dd>{{ column.title }}</dd>{% endfor %}</dl>
<h2>How to read it</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>
{% endfor %}</ul>
{% for section in sections %}<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
<div class="{{ "grid" if section.figures | length > 1 else "single" }}">
{% for figure in section.figures %}<figure><img alt="{{ figure.alt }}" src="data:image/png;base64,{{ figure.data }}"></figure>
{% endfor %}</div>
{% endfor %}
{% for heading, facts in fact_tables.items() %}<h2>{{ heading }}</h2>
<div class="wide"><table class="facts">{% for name, value in facts.items() %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        title: The heading.
        text: What the figures show.
        figures: PNG bytes by their alternative text.
    """

    title: str
    text: str
    figures: Mapping[str, bytes]


@dataclass(frozen=True)
class Report:
    """What the report holds; every text is escaped when it is rendered.

    Attributes:
        title: Heading of the page.
        introduction: Paragraphs before the table.
        rows: The table's rows, as in ``results.json``.
        notes: Caveats.
        sections: The figures.
        facts: Tables of names and values by their heading: the configuration, the versions.
    """

    title: str
    introduction: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def jinja_environment() -> "Environment":
    """The environment in which the page is rendered.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise MissingExtraError(
            "The HTML report needs jinja2, which is not installed. Install the extra `report`: "
            "pip install 'lightning-uq[report]'."
        ) from error
    return Environment(autoescape=True, trim_blocks=True)


def render_html(report: Report) -> str:
    """The report as one HTML document: figures are inside, nothing is loaded from elsewhere.

    Raises:
        MissingExtraError: jinja2 is not installed.

    Example:
        >>> page = render_html(Report("A < B", ["Two methods."], [{"method": "<b>", "nll": {"mean": 0.5, "se": None}}]))
        >>> "A &lt; B" in page, "&lt;b&gt;" in page, "<b>" in page
        (True, True, False)
    """
    environment = jinja_environment()
    columns = shown_columns(report.rows)
    best = {column.key: best_methods(report.rows, column) for column in columns}
    rows = [
        {
            "method": row["method"],
            "cells": [(*cell(row, column), row["method"] in best[column.key]) for column in columns],
        }
        for row in report.rows
    ]
    sections = [
        {
            "title": section.title,
            "text": section.text,
            "figures": [{"alt": alt, "data": base64.b64encode(png).decode()} for alt, png in section.figures.items()],
        }
        for section in report.sections
    ]
    return environment.from_string(_TEMPLATE).render(
        has_errors=any(se for row in rows for _, se, _ in row["cells"]),
        title=report.title,
        introduction=report.introduction,
        columns=columns,
        rows=rows,
        notes=report.notes,
        sections=sections,
        fact_tables=report.facts,
    )
