import numpy as np
import pytest
import torch
from scipy.stats import binom

from lightning_uq.errors import InputError
from lightning_uq.report import coverage_figure
from lightning_uq.report.figures.coverage import binomial_band
from lightning_uq.report.figures.drawing import FAINT

LEVELS = torch.tensor([0.5, 0.8, 0.9])


@pytest.mark.parametrize("count", [1, 7, 89, 1000, 1_000_000])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_the_band_holds_binomial_quantiles(count, share):
    expected = binom.ppf([0.025, 0.975], count, share) / count
    np.testing.assert_allclose(binomial_band(count, share), expected, rtol=1e-12)


def test_lines_are_the_coverages_in_percent():
    coverage = {"a": torch.tensor([0.4, 0.7, 0.85]), "b": torch.tensor([0.5, 0.8, 0.9])}
    figure = coverage_figure(coverage, LEVELS, num_rows=100)
    diagonal, *drawn = figure.axes[0].lines
    for line, values in zip(drawn, coverage.values(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), 100 * LEVELS)
        np.testing.assert_allclose(line.get_ydata(), 100 * values, rtol=1e-6)
    assert all(line.get_marker() == "None" for line in (diagonal, *drawn))
    assert "100 rows" in figure.axes[0].texts[0].get_text().replace("\n", " ")
    (band,) = figure.axes[0].collections
    edges = {y for x, y in band.get_paths()[0].vertices if x == pytest.approx(90)}
    assert sorted(edges) == pytest.approx([84, 95])


def test_many_methods_are_grey():
    coverage = {f"method {i}": LEVELS for i in range(20)}
    figure = coverage_figure(coverage, LEVELS, num_rows=100, highlighted=["method 19"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["method 19", "19 other methods"]
    assert [line.get_color() == FAINT for line in figure.axes[0].lines].count(True) == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coverage": {}}, "at least one method"),
        (
            {"coverage": {"a": torch.tensor([0.5])}},
            r"`coverage\['a'\]` must have the shape \[3\] and values in \[0, 1\]",
        ),
        ({"coverage": {"a": torch.tensor([0.5, 0.8, 1.1])}}, r"`coverage\['a'\]`"),
        ({"coverage": {"a": torch.tensor([0.5, 0.8, torch.nan])}}, r"`coverage\['a'\]`"),
        ({"levels": torch.tensor([0.5, 0.9, 0.8])}, "`levels` must .* increase within"),
        ({"levels": torch.tensor([0.5, 0.9, 1.0])}, "`levels` must .* increase within"),
        ({"num_rows": 0}, "`num_rows` must be at least 1, but it is 0"),
        ({"highlighted": ["b"]}, "`highlighted` must name"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    arguments = {"coverage": {"a": LEVELS}, "levels": LEVELS, "num_rows": 10, **changes}
    with pytest.raises(InputError, match=message):
        coverage_figure(**arguments)
