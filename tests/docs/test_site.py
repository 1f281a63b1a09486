"""The built site: every link leads somewhere, every public name has its place, nothing is left unrendered."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
NAMES = [line.split("(")[0] for line in (ROOT / "tests" / "api.txt").read_text().splitlines()]


class Page(HTMLParser):
    """The links, identifiers and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.text, self.skipped = [], set(), [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.skipped += tag in ("script", "style", "pre", "code")
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]

    def handle_endtag(self, tag):
        self.skipped -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


@pytest.fixture
def pages(site):
    return {path: Page(path) for path in sorted(site.resolve().rglob("*.html")) if path.name != "404.html"}


def test_every_link_leads_somewhere(pages):
    dead = set()
    for path, page in pages.items():
        for link in page.links:
            address, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:|//", address):
                continue
            target = (path.parent / address).resolve() if address else path
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                dead.add(f"{path.name}: {link}")
    assert not dead


def test_nothing_is_fetched_from_other_hosts(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", path.read_text())
        assert not loaded, path


def test_every_public_name_has_its_place(site, pages):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    modules = {
        f"lightning_uq.{room}"
        for room in ("active_learning", "data", "functional", "losses", "metrics", "networks", "tasks")
    }
    assert not {name for name in NAMES if name not in ids and name not in modules}


def test_formulas_citations_and_marks_are_rendered(pages):
    for path, page in pages.items():
        text = " ".join(page.text)
        assert not re.search(r"\\\(|\\\[|\[@\w|<!-- (table|methods) of|:class:|:func:|>>> ", text), path
