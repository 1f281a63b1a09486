"""The page in a headless browser: on a desktop and on a phone, light and dark. Skipped without Chromium or playwright."""

import shutil

import pytest
import torch

from lightning_uq.cli import main
from lightning_uq.report import (
    DENSITY_TITLES,
    Link,
    Report,
    Section,
    coverage_figure,
    difference_figure,
    regret_figure,
    reliability_diagram,
    render_html,
    risk_coverage_figure,
    score_histogram,
    shown_columns,
    to_svg,
)

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
METHODS = ["softmax", "energy", "relative_mahalanobis", "bayes_by_backprop", "ensemble_prior", "dropout"]
METHODS += ["epinet", "evidential", "laplace", "hypermodel", "conformal", "quantile", "ensemble", "maxnorm"]
KEYS = ["accuracy", "nll", "brier", "ece", "joint_log_loss", "coverage", "set_size", "ood_auroc", "ood_auprc_out"]
KEYS += ["ood_auprc_in", "ood_fpr95", "parameters", "train_seconds", "ms_per_1000"]
DESKTOP, PHONE = 1280, 390


def figures():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.1 + 0.9 * torch.rand(400, generator=generator)
    correct = torch.rand(400, generator=generator) < confidence
    levels = torch.linspace(0.05, 0.95, 19)
    curves = {name: (confidence + i, ~correct) for i, name in enumerate(METHODS)}
    losses = {name: (confidence, 3000 * torch.rand(400, generator=generator)) for name in METHODS}
    differences = {name: (0.01 * i - 0.05, 0.01 * i - 0.07, 0.01 * i - 0.03) for i, name in enumerate(METHODS[1:])}
    long = "softmax, energy, relative_mahalanobis, bayes_by_backprop"
    return {
        "Reliability": reliability_diagram(confidence, correct, title=long, note="ECE 0.012"),
        "Reliability of an event": reliability_diagram(confidence, correct, event="a malignant tumour", repeats=3),
        "Scores": score_histogram(confidence, confidence + 0.5, score="uncalibrated_expected_entropy", title=long),
        "Risk and coverage": risk_coverage_figure(curves, highlighted=METHODS[2:5], title="digits"),
        "Risk of a regression": risk_coverage_figure(losses, risk="Mean squared error (mg²/dl²)"),
        "Coverage": coverage_figure(dict.fromkeys(METHODS, levels**1.1), levels, num_rows=89, title="diabetes"),
        "Differences": difference_figure(
            differences,
            metric="NLL",
            reference="relative_mahalanobis",
            better="lower",
            tied=METHODS[3:6],
            title="NLL",
            notes=["95 % intervals over rows and seeds"],
        ),
        "Regret": regret_figure({name: torch.rand(3, 100, generator=generator).cumsum(1) for name in METHODS[:7]}),
    }


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The pages of two data sets and their index, with all that a page can hold."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"method": name, **{key: {"mean": 0.1 * ((7 * i) % 14) + 0.01, "se": 0.01} for key in KEYS}}
        for i, name in enumerate(METHODS)
    ]
    for row in rows:
        row["parameters"] = {"mean": 129_320, "se": 0.0}
    del rows[2]["nll"]
    svgs = {caption: to_svg(figure) for caption, figure in figures().items()}
    report = Report(
        title="Uncertainty methods compared on digits",
        verdict=["ensemble has the lowest NLL; dropout cannot be distinguished from it.", "This holds for 3 seeds."],
        introduction=["14 methods on digits: 862 training and 288 test samples."],
        rows=rows,
        tied={"nll": {"softmax", "dropout"}, "accuracy": {"softmax", "energy"}},
        intervals={"nll": dict.fromkeys(METHODS[3:], "+0.012 [0.003, 0.021] to softmax, over rows")},
        methods=dict.fromkeys(METHODS, ("One line that says what it is.", "https://example.org/paper")),
        notes=["The standard error is over seeds."],
        sections=[
            Section("Figures", "All of them.", svgs),
            Section("One figure", "", {"Alone": to_svg(reliability_diagram(torch.rand(99), torch.rand(99) > 0.5))}),
        ],
        facts={"Configuration": {"Command": "lightning-uq compare --data digits --methods " + ",".join(METHODS)}},
        pages=[Link("All data sets", "index.html"), Link("diabetes", "diabetes.html")],
    )
    numbers = [
        {"method": name, "rmse": {"mean": 53.2, "se": 1.2}, "nll": {"mean": -0.5, "se": None}} for name in METHODS
    ]
    regression = Report("diabetes", ["quantile is best."], rows=numbers, columns=shown_columns(numbers, DENSITY_TITLES))
    links = [Link("digits", "digits.html", "ensemble has the lowest NLL."), Link("diabetes", "diabetes.html", "A tie.")]
    index = Report("Two data sets", ["ensemble is best on both."], pages=links)
    for name, page in (("digits", report), ("diabetes", regression), ("index", index)):
        (folder / f"{name}.html").write_text(render_html(page), encoding="utf-8")
    quick = ["--methods", "softmax,ensemble", "--seeds", "2", "--max-epochs", "2", "--format", "csv"]
    assert main(["compare", *quick, "--out", str(folder / "compared")]) == 0
    shutil.copy(folder / "compared" / "report.html", folder / "compared.html")
    return folder.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the report; afterwards, it has asked for nothing and complained of nothing."""
    contexts, problems = [], []

    def start(width, scheme="light", name="digits", **settings):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: problems.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/{name}.html")
        return page

    yield start
    for context in contexts:
        context.close()
    assert all(problem.startswith(f"{address}/") and problem.endswith(".html") for problem in problems), problems


EVERYWHERE = pytest.mark.parametrize(("width", "scheme"), [(w, s) for w in (DESKTOP, PHONE) for s in ("light", "dark")])

CONTRASTS = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const background = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), color = parse(element.closest("svg") ? style.fill : style.color);
    const [light, dark] = [luminance(color), luminance(background(element))].sort((a, b) => b - a);
    found.push([(light + .05) / (dark + .05), walker.currentNode.data.trim()]);
  }
  return found;
}"""

TEXTS_OUTSIDE = """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - .5 || box.right > frame.right + .5 || box.top < frame.top - .5 || box.bottom > frame.bottom + .5;
  }).map(text => text.textContent);
})"""

OVERLAPS = """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")], found = [];
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
    const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
    // Boxes of lines that stand one below the other share a little of their leading.
    const width = Math.min(p.right, q.right) - Math.max(p.left, q.left), height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (width > 1 && height > .35 * Math.min(p.height, q.height)) found.push(a.textContent + " / " + b.textContent);
  }));
  return found;
})"""


@EVERYWHERE
@pytest.mark.parametrize("name", ["digits", "diabetes", "index", "compared"])
def test_nothing_is_wider_than_the_screen(open_page, width, scheme, name):
    page = open_page(width, scheme, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inner = page.evaluate("[...document.querySelectorAll('.wide')].map(one => one.scrollWidth - one.clientWidth)")
    assert all(excess <= 0 for excess in inner)
    boxes = page.evaluate("[...document.querySelectorAll('figure, svg')].map(one => one.getBoundingClientRect().right)")
    assert all(right <= width for right in boxes)
    assert len(boxes) == {"digits": 18, "compared": 14}.get(name, 0)


def test_on_a_tablet_the_table_scrolls_and_not_the_page(open_page):
    page = open_page(800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    assert page.evaluate("(one => one.scrollWidth > one.clientWidth)(document.querySelector('.results'))")


@EVERYWHERE
@pytest.mark.parametrize("name", ["digits", "compared"])
def test_every_text_has_contrast(open_page, width, scheme, name):
    page = open_page(width, scheme, name)
    page.get_by_label("Show the intervals").check()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [text for contrast, text in found if contrast < 4.5] == []


def test_figures_follow_the_scheme(open_page):
    paint = """() => {
      const ink = getComputedStyle(document.querySelector("figure text")).fill;
      return [ink, getComputedStyle(document.querySelector("figure svg path")).fill, getComputedStyle(document.body).backgroundColor];
    }"""
    light, dark = (open_page(DESKTOP, scheme).evaluate(paint) for scheme in ("light", "dark"))
    assert all(a != b for a, b in zip(light, dark, strict=True))


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["digits", "compared"])
def test_texts_of_figures_are_inside_and_apart(open_page, width, name):
    page = open_page(width, name=name)
    assert page.locator("figure text").count() > 100
    assert page.evaluate(TEXTS_OUTSIDE) == []
    assert page.evaluate(OVERLAPS) == []


def test_ids_are_unique_and_references_resolve(open_page):
    ids = open_page(DESKTOP).evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids)) > 20


def order(page):
    return [text.strip() for text in page.locator("#results tbody th").all_inner_texts()]


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("how", ["click", "key"])
def test_the_table_is_sorted_by_click_and_by_key(open_page, width, how):
    page = open_page(width)
    assert order(page) == METHODS

    def sort(label):
        button = page.locator("#results thead button", has_text=label)
        if how == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press("Enter")
        return button.locator("xpath=..").get_attribute("aria-sort")

    values = {name: (7 * i) % 14 for i, name in enumerate(METHODS)}
    assert sort("Acc.") == "descending"  # the best first
    assert order(page) == sorted(METHODS, key=lambda name: -values[name])
    assert sort("Acc.") == "ascending"
    assert order(page) == sorted(METHODS, key=lambda name: values[name])
    assert sort("NLL") == "ascending"
    assert order(page)[-1] == "relative_mahalanobis"  # it has no NLL
    assert sort("NLL") == "descending"
    assert order(page)[-1] == "relative_mahalanobis"
    assert sort("Method") == "ascending"
    assert order(page) == sorted(METHODS)
    states = page.locator("#results [aria-sort]").evaluate_all("heads => heads.map(head => head.ariaSort)")
    assert sorted(states) == ["ascending"] + ["none"] * len(KEYS)


def test_rows_are_cards_on_a_phone(open_page):
    page = open_page(PHONE)
    row = page.locator("#results tbody tr").first
    cells = row.locator("td")
    tops = cells.evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().top)")
    assert tops == sorted(set(tops))  # each below the one before
    labels = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell, '::before').content)")
    assert labels[:2] == ['"Acc.\xa0↑"', '"NLL\xa0↓"']
    desktop = open_page(DESKTOP).locator("#results tbody tr").first.locator("td")
    assert len(set(desktop.evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().top)"))) == 1


def test_intervals_are_readable_without_a_mouse(open_page):
    page = open_page(DESKTOP)
    notes = page.locator("#results .note")
    assert notes.count() == len(METHODS) - 3
    assert not notes.first.is_visible()
    page.get_by_label("Show the intervals").check()
    assert notes.first.is_visible()


@pytest.mark.parametrize("settings", [{"width": PHONE}, {"width": 1024, "has_touch": True, "is_mobile": True}])
def test_intervals_are_closed_without_a_mouse_too(open_page, settings):
    page = open_page(**settings)
    notes = page.locator("#results .note")
    assert not notes.first.is_visible()
    page.get_by_label("Show the intervals").check()
    assert notes.first.is_visible()


def test_figures_stand_in_two_columns_at_one_text_size(open_page):
    page = open_page(DESKTOP, name="compared")
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect()).map(one => [one.left, one.width])"
    )
    assert len({round(width) for _, width in boxes}) == 1
    assert len({round(left) for left, _ in boxes}) == 2
    assert page.locator("figcaption").count() == 0  # each figure has its own title


def test_the_page_is_complete_without_scripts(open_page):
    for width in (DESKTOP, PHONE):
        page = open_page(width, java_script_enabled=False)
        assert order(page) == METHODS
        assert page.locator("#results thead button").count() == 0


def test_paper_is_light_and_nothing_is_cut(open_page):
    page = open_page(DESKTOP, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 1039, "height": 700})  # A4, landscape, without its margins
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(26, 26, 26)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1039
    assert page.evaluate("[...document.querySelectorAll('.wide')].every(one => one.scrollWidth <= one.clientWidth)")


def test_links_lead_to_the_other_pages(open_page, address):
    page = open_page(DESKTOP, name="index")
    page.get_by_role("link", name="digits").click()
    assert page.url == f"{address}/digits.html"
    page.get_by_role("link", name="All data sets").click()
    assert page.url == f"{address}/index.html"
