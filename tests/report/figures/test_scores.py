import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.report import score_histogram, score_label, to_svg


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


def test_the_legend_is_outside_and_the_sides_differ_in_more_than_colour():
    figure = score_histogram(torch.rand(50), 1 + torch.rand(50), score="energy", note="AUROC 0.5")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["In distribution", "Out of distribution"]
    figure.draw_without_rendering()
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len({str(patch.get_linestyle()) for patch in outlines}) == 2


def test_a_constant_score_is_drawn():
    assert "Density" in to_svg(score_histogram(torch.zeros(5), torch.zeros(3), score="max_logit"))


@pytest.mark.parametrize("bad", [torch.empty(0), torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf])])
def test_empty_and_not_finite_scores_are_refused(bad):
    with pytest.raises(InputError, match=r"`score_out` must hold finite scores"):
        score_histogram(torch.zeros(2), bad, score="energy")
    with pytest.raises(InputError, match=r"`score_in` must hold finite scores"):
        score_histogram(bad, torch.zeros(2), score="energy")


def test_every_score_has_a_label():
    assert score_label("log_density") == "− log density of the features"  # higher = further out
    assert score_label("someone_elses") == "someone elses"
