import itertools

import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.report import regret_figure, to_svg


def test_curves_are_medians_in_bands_of_quartiles():
    runs = torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 6.0], [100.0, 200.0, 300.0]])
    figure = regret_figure({"a": runs, "b": runs[:1] / 100}, title="two")
    (axes,) = figure.axes
    a, b = axes.lines
    np.testing.assert_allclose(a.get_ydata(), [3.0, 6.0, 6.0])
    np.testing.assert_allclose(b.get_ydata(), [0.01, 0.02, 0.04])
    assert a.get_xdata()[-1] == 3
    (band,) = axes.collections  # one run has none
    last = sorted({y for x, y in band.get_paths()[0].vertices if x == 3})
    np.testing.assert_allclose([last[0], last[-1]], [5.0, 153.0], rtol=1e-6)  # halfway between the runs
    assert axes.get_title(loc="left") == "two"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a (6)", "b (0.04)"]
    assert axes.get_yticks()[0] == 0


@pytest.mark.parametrize("last", [0.3, 1.0, 7.0, 98.0, 4321.0])
def test_the_labels_of_the_regret_have_room(last):
    figure = regret_figure({"a": torch.linspace(0, last, 50)[None]})
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) > 3
    assert all(upper.y0 > lower.y1 for lower, upper in itertools.pairwise(boxes))


@pytest.mark.parametrize("runs", [torch.zeros(2, 4), torch.zeros(1, 1), 1e6 * torch.ones(2, 3)])
def test_regret_of_nothing_or_of_much_is_drawn(runs):
    assert "Step" in to_svg(regret_figure({"a": runs}))


@pytest.mark.parametrize("regret", [{}, {"a": torch.zeros(0, 3)}, {"a": torch.zeros(3)}])
def test_no_regret_is_refused(regret):
    with pytest.raises(InputError, match=r"`regret` must hold runs \[S, T\] of at least one method"):
        regret_figure(regret)
