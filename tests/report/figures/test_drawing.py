import io
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Text

from lightning_uq.errors import MissingExtraError
from lightning_uq.report import (
    coverage_figure,
    difference_figure,
    regret_figure,
    reliability_diagram,
    risk_coverage_figure,
    score_histogram,
    to_png,
    to_svg,
)
from lightning_uq.report.figures.drawing import COLORS, VARIABLES

SVG = "{http://www.w3.org/2000/svg}"


def reliability(title="", few=False):
    confidence = torch.linspace(0.1 if few else 0.8, 1, 300)
    return reliability_diagram(confidence, confidence > 0.5, title=title)


def all_figures(name="softmax"):
    scores, levels = torch.linspace(0, 1, 100), torch.tensor([0.5, 0.9])
    curves = {name: (scores, scores > 0.5), **{f"m{i}": (-scores, scores > 0.5) for i in range(5)}}
    return [
        reliability(name, few=True),
        score_histogram(scores, scores + 1, score="energy", title=name),
        risk_coverage_figure(curves, title=name),
        coverage_figure({name: levels, "other": levels / 2}, levels, num_rows=50, title=name),
        difference_figure(
            {name: (0.1, 0.0, 0.2)}, metric="NLL", reference=name, better="lower", tied={name}, title=name
        ),
        regret_figure({name: torch.rand(3, 20).cumsum(1)}, title=name),
    ]


def ids(svg):
    return [element.attrib["id"] for element in ElementTree.fromstring(svg).iter() if "id" in element.attrib]


def references(svg):
    return re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)


def test_every_figure_is_an_element_that_repeats():
    for figure, again in zip(all_figures(), all_figures(), strict=True):
        svg = to_svg(figure)
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
        assert "width" not in ElementTree.fromstring(svg).attrib
        assert not {"metadata", "style"} & {
            element.tag.removeprefix(SVG) for element in ElementTree.fromstring(svg).iter()
        }
        if figure.axes[0].get_xlabel() != "Step":  # random
            assert svg == to_svg(again)


def test_ids_differ_between_figures_and_what_is_referred_to_exists():
    svgs = [to_svg(figure) for figure in all_figures()]
    every = [one for svg in svgs for one in ids(svg)]
    assert len(every) == len(set(every)) > 6
    for svg in svgs:
        assert set(references(svg)) == set(ids(svg))
    assert not set(ids(to_svg(reliability("a")))) & set(ids(to_svg(reliability("b"))))


def test_every_colour_is_a_variable_of_the_page():
    for figure in all_figures():
        svg = to_svg(figure)
        painted = re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)
        assert {color for color in painted if not color.startswith("var(")} <= {"none"}
        assert {re.match(r"var\(--([^,]+), #", color)[1] for color in painted if color != "none"} <= set(
            VARIABLES.values()
        )
        texts = list(ElementTree.fromstring(svg).iter(f"{SVG}text"))
        assert len(texts) > 5
        assert all("fill: var(--ink" in text.attrib["style"] for text in texts)
        assert "DejaVu" not in svg


def test_text_is_text_whatever_it_holds():
    name = 'a <b> & $x_1$ "q"'
    for figure in all_figures(name):  # an axis label may be wrapped
        texts = " ".join("".join(text.itertext()) for text in ElementTree.fromstring(to_svg(figure)).iter(f"{SVG}text"))
        assert name in texts


def test_numbers_of_texts_are_not_shortened():
    svg = to_svg(reliability("0.123456"))
    assert "0.123456" in svg
    assert not re.search(r' d="[^"]*\.\d{3}', svg)


def test_png_repeats_and_is_not_blank():
    first = to_png(reliability())
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == to_png(reliability())
    assert imread(io.BytesIO(first))[..., :3].std() > 0.1


def test_no_global_state_of_matplotlib():
    import matplotlib
    import matplotlib.pyplot as plt

    before, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    to_png(reliability())
    to_svg(reliability())
    assert plt.get_fignums() == before
    assert dict(matplotlib.rcParams) == settings


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"extra `report`.*lightning-uq\[report\]"):
        reliability()


def test_the_colours_of_the_palette_differ():
    assert len({color.lower() for color in COLORS}) == len(COLORS)
    assert len({VARIABLES[color.lower()] for color in COLORS}) == len(COLORS)


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def inside(box, frame):
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_long_texts_stay_inside():
    long = "a rather long name of a method, or of several methods that share their predictions"
    scores, levels = torch.linspace(0, 1, 100), torch.tensor([0.5, 0.9])
    risk = "Mean absolute error of the progression after one year (mg/dl)"
    event = "a malignant tumour within the next five years"
    figures = [
        *all_figures(long),
        risk_coverage_figure({long: (scores, scores), "b": (scores, scores)}, risk=risk),
        reliability_diagram(scores, scores > 0.5, event=event, note=long),
        coverage_figure({long: levels}, levels, num_rows=10**9),
        difference_figure({long: (0, 0, 0)}, metric="Interval score", reference="relative_mahalanobis", better="lower"),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        frame = figure.bbox.padded(1)
        ticks = {label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())}
        drawn = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in ticks_in_view(axis)}
        outside = [
            text.get_text()
            for text in figure.findobj(Text)
            if text.get_text() and text not in ticks - drawn and not inside(text.get_window_extent(), frame)
        ]
        assert outside == [], figure
