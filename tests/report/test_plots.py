import io
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.functional import bin_statistics
from lightning_uq.report import regret_figure, reliability_diagram, risk_coverage_figure, score_histogram, to_png
from lightning_uq.report.plots import COLORS, LINES, score_label


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.1 + 0.9 * torch.rand(500, generator=generator)
    return confidence, torch.rand(500, generator=generator) < confidence


def pixels(figure):
    return imread(io.BytesIO(to_png(figure)))[..., :3]


def bars(axes):
    return [patch for patch in axes.patches if patch.get_height() > 0]


# ------------------------------------------------------------------ reliability


def test_reliability_bars_are_the_bins_accuracies(predictions):
    confidence, correct = predictions
    figure = reliability_diagram(confidence, correct, num_bins=10, title="softmax", note="ECE 0.123")
    count, hits, _ = bin_statistics(confidence, correct, 10)
    used = count > 0
    top, bottom = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in top.patches], (hits / count)[used])
    np.testing.assert_allclose([bar.get_height() for bar in bottom.patches], count[used])
    assert [bar.get_x() + bar.get_width() / 2 for bar in top.patches] == pytest.approx(
        ((torch.arange(10) + 0.5) / 10)[used].tolist()
    )
    assert top.get_title() == "softmax"
    assert top.get_legend().get_title().get_text() == "ECE 0.123"
    assert (top.get_ylabel(), bottom.get_xlabel(), bottom.get_ylabel()) == ("Accuracy", "Confidence", "Inputs")


def test_wilson_intervals(predictions):
    """The ends are the roots of (p - q)^2 = z^2 q (1 - q) / n, by definition."""
    figure = reliability_diagram(torch.full((10,), 0.95), torch.arange(10) > 0)
    (segment,) = figure.axes[0].collections[0].get_segments()
    for end in segment[:, 1]:
        assert (0.9 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 10)
    certain = reliability_diagram(torch.full((10,), 0.95), torch.ones(10, dtype=torch.bool))
    (segment,) = certain.axes[0].collections[0].get_segments()
    assert segment[1, 1] == pytest.approx(1)
    assert 0.6 < segment[0, 1] < 0.8  # ten successes of ten are no certainty


@pytest.mark.parametrize("size", [1, 2])
def test_reliability_of_very_few(size):
    image = pixels(reliability_diagram(torch.ones(size), torch.ones(size, dtype=torch.bool)))
    assert image.std() > 0.05


def test_reliability_refuses_what_it_cannot_draw():
    with pytest.raises(InputError, match=r"the shape \[N\] with N > 0, but their shapes are \[0\] and \[0\]"):
        reliability_diagram(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(InputError, match=r"\[3\] and \[2\]"):
        reliability_diagram(torch.ones(3), torch.ones(2, dtype=torch.bool))


# ------------------------------------------------------------------ histograms


def test_histograms_have_area_one_and_hold_every_score():
    score_in = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([1e4])])
    figure = score_histogram(score_in, score_in + 1, score="energy", title="a", note="AUROC 0.5")
    axes = figure.axes[0]
    assert axes.get_xlim()[1] < 10  # one far score does not squeeze the others into a bin
    filled = [patch for patch in axes.patches if patch.get_fill()]
    assert len(filled) == 2
    for polygon in filled:
        x, y = polygon.get_xy().T
        width = (axes.get_xlim()[1] - axes.get_xlim()[0]) / 40
        assert y.max() * width < 1
        assert abs(np.trapezoid(y, x)) == pytest.approx(1, rel=1e-6)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Energy", "Density (square-root scale)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["In distribution", "Out of distribution"]


def test_histogram_of_a_constant_score():
    assert pixels(score_histogram(torch.zeros(5), torch.zeros(3), score="max_logit")).std() > 0.05


@pytest.mark.parametrize("bad", [torch.empty(0), torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf])])
def test_histogram_refuses_empty_and_not_finite(bad):
    with pytest.raises(InputError, match=r"`score_out` must hold finite scores"):
        score_histogram(torch.zeros(2), bad, score="energy")
    with pytest.raises(InputError, match=r"`score_in` must hold finite scores"):
        score_histogram(bad, torch.zeros(2), score="energy")


def test_every_score_has_a_label():
    assert score_label("log_density") == "- log density of the features"  # higher = further out
    assert score_label("someone_elses") == "someone elses"


# ------------------------------------------------------------------ risk and coverage


def test_risk_coverage_ends_at_the_error_rate(predictions):
    confidence, correct = predictions
    figure = risk_coverage_figure({"softmax": (confidence, ~correct), "other": (-confidence, ~correct)})
    for line in figure.axes[0].lines:
        assert line.get_xdata()[-1] == 1
        assert line.get_ydata()[-1] == pytest.approx(100 * float((~correct).double().mean()))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["softmax", "other"]


def test_axis_starts_before_the_first_error():
    confidence = torch.linspace(1, 0, 100)
    figure = risk_coverage_figure(
        {"late": (confidence, torch.arange(100) >= 62), "none": (confidence, torch.zeros(100) > 0)}
    )
    low, high = figure.axes[0].get_xlim()
    assert 0.5 < low < 0.62
    assert high == 1
    nothing_wrong = risk_coverage_figure({"none": (confidence, torch.zeros(100) > 0)})
    assert nothing_wrong.axes[0].get_xlim()[1] == 1
    assert pixels(nothing_wrong).std() > 0.05


def test_many_methods_stay_distinct(predictions):
    confidence, correct = predictions
    figure = risk_coverage_figure({f"method {i}": (confidence, ~correct) for i in range(len(COLORS) * len(LINES))})
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(COLORS) * len(LINES)


def test_risk_coverage_needs_a_method():
    with pytest.raises(InputError, match="at least one method"):
        risk_coverage_figure({})


# ------------------------------------------------------------------ drawing


def test_png_repeats_and_is_not_blank(predictions):
    figure = reliability_diagram(*predictions)
    first = to_png(figure)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == to_png(reliability_diagram(*predictions))
    assert pixels(figure).std() > 0.1


def test_no_global_state_of_matplotlib(predictions):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    to_png(reliability_diagram(*predictions))
    assert plt.get_fignums() == before


def test_missing_matplotlib_names_the_extra(monkeypatch, predictions):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"extra `report`.*lightning-uq\[report\]"):
        reliability_diagram(*predictions)


# ------------------------------------------------------------------ regret


def test_regret_curves_are_means_in_bands_of_standard_errors():
    runs = torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 6.0]])
    figure = regret_figure({"a": runs, "b": runs[:1] / 100}, title="two")
    (axes,) = figure.axes
    a, b = axes.lines
    np.testing.assert_allclose(a.get_ydata(), [2.0, 4.0, 5.0])
    np.testing.assert_allclose(b.get_ydata(), [0.01, 0.02, 0.04])
    assert a.get_xdata()[-1] == 3
    (band,) = axes.collections  # one run has none
    last = sorted({y for x, y in band.get_paths()[0].vertices if x == 3})
    np.testing.assert_allclose([last[0], last[-1]], [4.0, 6.0], rtol=1e-6)  # 5 -+ sqrt(2) / sqrt(2)
    assert axes.get_title() == "two"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert axes.get_yticks()[0] == 0


@pytest.mark.parametrize("runs", [torch.zeros(2, 4), torch.zeros(1, 1), 1e6 * torch.ones(2, 3)])
def test_regret_of_nothing_or_of_much_is_drawn(runs):
    assert pixels(regret_figure({"a": runs})).shape[2] == 3


@pytest.mark.parametrize("regret", [{}, {"a": torch.zeros(0, 3)}, {"a": torch.zeros(3)}])
def test_no_regret_is_refused(regret):
    with pytest.raises(InputError, match=r"`regret` must hold runs \[S, T\] of at least one method"):
        regret_figure(regret)
