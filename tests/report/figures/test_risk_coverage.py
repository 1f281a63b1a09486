import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional import risk_coverage_curve
from lightning_uq.report import risk_coverage_figure
from lightning_uq.report.figures.drawing import COLORS, FAINT
from lightning_uq.report.figures.risk_coverage import MAX_POINTS


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(300, generator=generator)
    return confidence, torch.rand(300, generator=generator) > confidence


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_line_is_the_risk_coverage_curve(predictions):
    certainty, wrong = predictions
    certainty = (4 * certainty).round()  # ties
    line = lines(risk_coverage_figure({"softmax": (certainty, wrong)}))["softmax"]
    coverage, risk = risk_coverage_curve(certainty, wrong)
    np.testing.assert_allclose(line.get_xdata(), 100 * coverage)
    np.testing.assert_allclose(line.get_ydata(), 100 * risk)


def test_many_rows_keep_both_ends(predictions):
    certainty = torch.linspace(1, 0, 5000)
    line = lines(risk_coverage_figure({"a": (certainty, certainty < 0.3)}))["a"]
    assert len(line.get_xdata()) == MAX_POINTS
    assert line.get_xdata()[[0, -1]] == pytest.approx([0.02, 100])
    assert line.get_ydata()[-1] == pytest.approx(30, abs=0.1)


def test_losses_are_means_with_their_unit():
    certainty, loss = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 4.5])
    figure = risk_coverage_figure({"a": (certainty, loss)}, risk="Mean squared error (mm²)")
    np.testing.assert_allclose(lines(figure)["a"].get_ydata(), [0.5, 0.75, 2.0])
    assert figure.axes[0].get_ylabel() == "Mean squared error (mm²)"


def test_the_axis_starts_before_the_first_error():
    certainty = torch.linspace(1, 0, 100)
    late, never = (certainty, torch.arange(100) >= 62), (certainty, torch.zeros(100) > 0)
    low, high = risk_coverage_figure({"late": late, "none": never}).axes[0].get_xlim()
    assert 50 < low < 62
    assert high == 100
    assert risk_coverage_figure({"none": never}).axes[0].get_xlim() == (0, 100)


def test_one_early_error_does_not_set_the_scale():
    certainty = torch.linspace(1, 0, 1000)
    wrong = torch.arange(1000) >= 980
    spike = wrong.clone()
    spike[0] = True
    figure = risk_coverage_figure({"a": (certainty, wrong), "b": (certainty, spike)})
    assert figure.axes[0].get_ylim()[1] < 6
    certainty, wrong = torch.linspace(1, 0, 1000), torch.arange(1000) >= 800
    wrong[0] = True
    assert risk_coverage_figure({"a": (certainty, wrong)}).axes[0].get_xlim() == pytest.approx((75, 100))


def test_four_methods_are_coloured_and_the_others_grey(predictions):
    names = [f"method {i}" for i in range(9)]
    figure = risk_coverage_figure(dict.fromkeys(names, predictions), highlighted=[names[7], names[2]])
    drawn = figure.axes[0].lines
    assert [line.get_color() for line in drawn] == [FAINT] * 7 + [COLORS[0], COLORS[1]]
    assert legend(figure) == ["method 7", "method 2", "7 other methods"]
    first = risk_coverage_figure(dict.fromkeys(names, predictions))
    assert legend(first) == [*names[:4], "5 other methods"]
    coloured = [line for line in first.axes[0].lines if line.get_color() != FAINT]
    assert len({line.get_color() for line in coloured}) == len({str(line._dash_pattern) for line in coloured}) == 4


def test_a_single_grey_method_has_its_name(predictions):
    names = [*"abcde"]
    assert legend(risk_coverage_figure(dict.fromkeys(names, predictions))) == names


def test_the_legend_shows_any_name(predictions):
    assert legend(risk_coverage_figure({"_mine": predictions, "a$x$": predictions})) == ["_mine", "a$x$"]


def test_what_cannot_be_drawn_is_refused(predictions):
    certainty, wrong = predictions
    with pytest.raises(InputError, match="at least one method"):
        risk_coverage_figure({})
    with pytest.raises(InputError, match="`risk` must say what the losses are"):
        risk_coverage_figure({"a": (certainty, wrong.float())})
    with pytest.raises(InputError, match="either errors .* for all methods or losses"):
        risk_coverage_figure({"a": (certainty, wrong.float()), "b": predictions}, risk="x")
    with pytest.raises(InputError, match=r"`curves\['a'\]` must hold two tensors \[N\].*\[300\] and \[2\]"):
        risk_coverage_figure({"a": (certainty, wrong[:2])})
    with pytest.raises(InputError, match=r"`curves\['a'\]` has a certainty that is NaN"):
        risk_coverage_figure({"a": (certainty.log() * torch.nan, wrong)})
    with pytest.raises(InputError, match=r"a loss that is NaN or infinite"):
        risk_coverage_figure({"a": (certainty, certainty / 0)}, risk="x")
    with pytest.raises(InputError, match="at most 4 of the methods a, but it is b"):
        risk_coverage_figure({"a": predictions}, highlighted=["b"])
    five = dict.fromkeys("abcde", predictions)
    with pytest.raises(InputError, match="at most 4 of the methods"):
        risk_coverage_figure(five, highlighted=list(five))


def test_no_line_leaves_the_figure_at_the_top():
    generator = torch.Generator().manual_seed(0)
    certainty, loss = torch.linspace(1, 0, 200), torch.rand(200, generator=generator)
    loss[:5] = 50  # the mean of so few rows is noise
    loss = loss + 1
    figure = risk_coverage_figure({"a": (certainty, loss), "b": (certainty, loss.flip(0))}, risk="Loss")
    low, high = figure.axes[0].get_ylim()
    for line in figure.axes[0].lines:
        drawn = line.get_ydata()[np.isfinite(line.get_ydata())]
        assert len(drawn) > 150
        assert low <= drawn.min()
        assert drawn.max() <= high


def test_the_worst_of_the_grey_lines_are_named_where_nothing_is_in_the_way(predictions):
    certainty, wrong = predictions
    bad, awful = torch.arange(300) % 2 > 0, torch.arange(300) % 5 > 0
    curves = {**dict.fromkeys("abcd", (certainty, wrong)), "same": (certainty, wrong), "bad": (certainty, bad), "awful": (certainty, awful)}  # fmt: skip
    figure = risk_coverage_figure(curves)
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"bad", "awful"}  # "same" lies on coloured lines
    figure.draw_without_rendering()
    for text in axes.texts:
        assert axes.get_window_extent().contains(*text.get_window_extent().max)
    assert not risk_coverage_figure(dict.fromkeys("abcde", predictions)).axes[0].texts  # the legend names the only one
