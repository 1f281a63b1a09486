import base64
from html.parser import HTMLParser

import pytest

from lightning_uq.report import Report, Section, render_html

ROWS = [
    {"method": "softmax", "accuracy": {"mean": 0.9, "se": 0.01}, "nll": {"mean": 0.25, "se": 0.02}},
    {"method": "ensemble", "accuracy": {"mean": 0.95, "se": 0.01}},
]


class Page(HTMLParser):
    """Collects tags with their attributes, the text of table cells, and what is opened but not closed."""

    VOID = ("meta", "img", "br", "link")

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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def make(**changes):
    figures = {"Reliability of softmax": b"PNG 1", "Reliability of ensemble": b"PNG 2"}
    arguments = {
        "title": "Methods compared",
        "introduction": ["Two methods."],
        "rows": ROWS,
        "notes": ["Few samples."],
        "sections": [Section("Reliability", "How to read.", figures)],
        "facts": {"Versions": {"torch": "2.x"}},
    }
    return render_html(Report(**{**arguments, **changes}))


def test_page_holds_the_table_figures_and_facts():
    page = Page(make())
    assert page.open == []
    assert page.cells[:9] == [
        "Method",
        "Acc.↑",
        "NLL↓",
        "softmax",
        "0.900±0.010",
        "0.250±0.020",
        "ensemble",
        "0.950±0.010",
        "-",
    ]
    assert page.cells[9:] == ["torch", "2.x"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["Reliability of softmax", "Reliability of ensemble"]
    assert [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images] == [
        b"PNG 1",
        b"PNG 2",
    ]
    assert "Few samples." in make()


def test_nothing_is_loaded_from_elsewhere():
    page = Page(make())
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in make()
    assert "@import" not in make()


def test_the_best_is_bold():
    bold = [attributes for tag, attributes in Page(make()).tags if tag == "td" and attributes.get("class") == "best"]
    assert len(bold) == 1  # accuracy; NLL has one value


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "<script>alert(1)</script>"},
        {"introduction": ["<script>alert(1)</script>"]},
        {"notes": ["<script>alert(1)</script>"]},
        {"rows": [{"method": "<script>alert(1)</script>", "nll": {"mean": 1.0, "se": None}}]},
        {"sections": [Section("<script>alert(1)</script>", "", {})]},
        {"sections": [Section("", "<script>alert(1)</script>", {})]},
        {"sections": [Section("", "", {'"><script>alert(1)</script>': b""})]},
        {"facts": {"<script>alert(1)</script>": {"a": "b"}}},
        {"facts": {"a": {"<script>alert(1)</script>": "b"}}},
        {"facts": {"a": {"b": "<script>alert(1)</script>"}}},
    ],
)
def test_every_text_is_escaped(changes):
    page = make(**changes)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "script" not in {tag for tag, _ in Page(page).tags}


def test_one_seed_has_no_error_to_explain():
    page = make(rows=[{"method": "softmax", "nll": {"mean": 0.25, "se": None}}])
    assert "Values of one seed" in page
    assert "standard error" not in page


def test_page_is_for_phones_and_paper():
    page = make()
    assert 'name="viewport"' in page
    assert "@media print" in page
