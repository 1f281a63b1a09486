import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.report import Link, Report, Section, reliability_diagram, render_html, shown_columns, to_svg

ROWS = [
    {"method": "softmax", "accuracy": {"mean": 0.9, "se": 0.01}, "nll": {"mean": 0.25, "se": 0.02}},
    {"method": "ensemble", "accuracy": {"mean": 0.95, "se": 0.01}},
    {"method": "dropout", "accuracy": {"mean": 0.94, "se": 0.01}, "coverage": {"mean": 0.9, "se": 0.01}},
]
SVG = to_svg(reliability_diagram(torch.linspace(0.5, 1, 50), torch.arange(50) > 9))


class Page(HTMLParser):
    """Collects tags with their attributes, the text of table cells, and what is opened but not closed."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def make(**changes):
    arguments = {
        "title": "Methods compared",
        "verdict": ["ensemble is best.", "On this data."],
        "introduction": ["Three methods."],
        "rows": ROWS,
        "tied": {"accuracy": {"ensemble", "dropout"}, "nll": None},
        "intervals": {"accuracy": {"dropout": "-0.01 [-0.02, 0.01] to ensemble"}},
        "methods": {"softmax": ("One network.", None), "ensemble": ("Five networks.", "https://example.org/paper")},
        "notes": ["Few samples."],
        "sections": [Section("Reliability", "How to read.", {"Reliability of softmax": SVG, "Of ensemble": SVG})],
        "facts": {"Versions": {"torch": "2.x"}},
        "pages": [Link("All data sets", "index.html")],
    }
    return render_html(Report(**{**arguments, **changes}))


def body_cells(page):
    return [attributes for tag, attributes in Page(page).tags if tag == "td" and attributes.get("role") == "cell"]


def test_page_holds_the_verdict_the_table_the_figures_and_the_facts():
    text = make()
    page = Page(text)
    assert page.open == []
    cells = [" ".join(cell.split()) for cell in page.cells]
    assert cells[:3] == ["Group", "Prediction", "Sets of classes"]
    assert cells[3:] == [
        *("Method", "Acc. ↑", "NLL ↓", "Cover"),
        *("softmax", "0.900±0.010", "0.250±0.020", "-"),
        *("ensemble", "0.950 best±0.010", "-", "-"),
        *("dropout", "0.940±0.010 tied-0.01 [-0.02, 0.01] to ensemble", "-", "0.900±0.010"),
        *("torch", "2.x"),
    ]
    positions = [
        text.index(part)
        for part in ("ensemble is best.", "Three methods.", "0.250", "Few samples.", "<svg", "Five networks.", "2.x")
    ]
    assert positions == sorted(positions)
    assert text.count('<svg role="img" aria-label="') == 2
    assert 'aria-label="Reliability of softmax"' in text


def test_nothing_is_loaded_from_elsewhere():
    page = Page(make())
    assert not {"link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if "src" in attributes]
    addresses = [attributes["href"] for tag, attributes in page.tags if tag != "a" and "href" in attributes]
    assert all(address.startswith("#") for address in addresses)
    assert "@import" not in make()
    assert not re.search(r"url\((?!#)", make())
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_the_best_and_its_ties_are_marked():
    marked = {
        (attributes["data-label"].split()[0], attributes.get("data-value")): attributes["class"].split()[0]
        for attributes in body_cells(make())
        if {"best", "tied"} & set(attributes["class"].split())
    }
    assert marked == {("Acc.", "0.95"): "best", ("Acc.", "0.94"): "tied"}  # NLL has one value, coverage no best
    assert "cannot be distinguished from the best" in make()
    assert "cannot be distinguished from the best" not in make(tied={})


def test_cells_have_what_sorting_and_cards_need():
    cells = body_cells(make())
    assert [cell["data-label"] for cell in cells[:3]] == ["Acc.\xa0↑", "NLL\xa0↓", "Cover"]
    assert [cell.get("data-value") for cell in cells[:3]] == ["0.9", "0.25", None]
    assert [cell.get("title") for cell in cells if "title" in cell] == ["-0.01 [-0.02, 0.01] to ensemble"]


def test_methods_lead_to_their_line_and_source():
    page = Page(make())
    anchors = {attributes["id"] for tag, attributes in page.tags if tag == "dt" and "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["index.html", "#method-1", "#method-2", "https://example.org/paper"]
    assert anchors == {"method-1", "method-2"}


def test_an_index_page_has_cards_and_no_table():
    text = render_html(Report("Data sets", ["a wins."], pages=[Link("digits", "digits.html", "ensemble is best.")]))
    assert Page(text).open == []
    assert 'class="cards"' in text
    assert "ensemble is best." in text
    assert not {"table", "script"} & {tag for tag, _ in Page(text).tags}


EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    "changes",
    [
        {"title": EVIL},
        {"verdict": [EVIL]},
        {"introduction": [EVIL]},
        {"notes": [EVIL]},
        {"rows": [{"method": EVIL, "nll": {"mean": 1.0, "se": None}}], "tied": {}, "intervals": {}},
        {"intervals": {"accuracy": {"dropout": EVIL}}},
        {"intervals": {"accuracy": {"dropout": f'"{EVIL}'}}},
        {"methods": {EVIL: ("", None)}},
        {"methods": {"softmax": (EVIL, None)}},
        {"methods": {"softmax": ("", f'https://a/"{EVIL}')}},
        {"sections": [Section(EVIL, "", {})]},
        {"sections": [Section("", EVIL, {})]},
        {"sections": [Section("", "", {f'">{EVIL}': SVG})]},
        {"facts": {EVIL: {"a": "b"}}},
        {"facts": {"a": {EVIL: "b"}}},
        {"facts": {"a": {"b": EVIL}}},
        {"pages": [Link(EVIL, "a.html")]},
        {"pages": [Link("a", f'a"{EVIL}.html')]},
        {"pages": [Link("a", "a.html", EVIL)]},
    ],
)
def test_every_text_is_escaped(changes):
    page = make(**changes)
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert [tag for tag, _ in Page(page).tags].count("script") == 1


def test_a_figure_escapes_its_texts():
    figure = reliability_diagram(torch.rand(9), torch.rand(9) > 0.5, title=EVIL, event=EVIL)
    page = make(sections=[Section("", "", {"a": to_svg(figure)})])
    assert [tag for tag, _ in Page(page).tags].count("script") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": [Link("a", "javascript:alert(1)")]}, "A link must be relative .* but it is 'javascript:alert"),
        ({"methods": {"softmax": ("", "data:text/html,a")}}, "A link must be relative"),
        ({"verdict": "ensemble is best."}, "`verdict` must be a list of texts, but it is a single text"),
        ({"notes": "Few."}, "`notes` must be a list"),
        ({"introduction": "Two."}, "`introduction` must be a list"),
        (
            {"intervals": {"nll": {"nobody": "a"}}},
            r"`intervals\['nll'\]` names methods that have no row: nobody",
        ),
        ({"tied": {"nll": {"nobody"}}}, r"`tied\['nll'\]` names methods that have no row: nobody"),
        ({"sections": [Section("", "", {"a": "<img>"})]}, "The figure 'a' must be an SVG element from `to_svg`"),
    ],
)
def test_what_cannot_be_shown_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_columns_may_be_chosen_and_retitled():
    columns = shown_columns(ROWS, {"nll": "Of densities"})[1:]
    page = make(columns=columns, intervals={}, tied={})
    assert "Acc." not in page
    assert page.count("Of densities") == 2
    assert "Negative log-likelihood" not in page


def test_one_seed_has_no_error_to_explain():
    page = make(rows=[{"method": "softmax", "nll": {"mean": 0.25, "se": None}}], tied={}, intervals={})
    assert "Values of one seed" in page
    assert "standard error" not in page


def test_the_template_is_part_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"report/page.html.jinja"' in project
