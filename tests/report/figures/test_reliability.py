import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lightning_uq.errors import InputError
from lightning_uq.functional import bin_statistics
from lightning_uq.report import reliability_diagram, to_svg
from lightning_uq.report.figures.drawing import FAINT, IN_COLOR


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.1 + 0.9 * torch.rand(500, generator=generator)
    return confidence, torch.rand(500, generator=generator) < confidence


def colors(axes):
    return [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]


def texts(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_bars_are_the_bins_accuracies(predictions):
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
    assert top.get_title(loc="left") == "softmax"
    assert "ECE 0.123" in texts(figure)
    assert (top.get_ylabel(), bottom.get_xlabel(), bottom.get_ylabel()) == ("Accuracy", "Confidence", "Inputs")


def test_no_marker_lies_on_the_diagonal_and_no_text_over_a_bar(predictions):
    figure = reliability_diagram(*predictions, title="a", note="ECE 0.1")
    top = figure.axes[0]
    (diagonal, *_) = [line for line in top.lines if len(line.get_xdata()) == 2]
    assert diagonal.get_marker() == "None"
    assert not [
        line for line in top.lines if line.get_marker() == "D" or np.array_equal(line.get_xdata(), line.get_ydata())
    ][1:]
    assert top.get_legend() is None
    figure.draw_without_rendering()
    frame = top.get_window_extent()
    assert all(text.get_window_extent().y0 >= frame.y1 for text in top.texts)


def test_wilson_intervals():
    """The ends are the roots of (p - q)^2 = z^2 q (1 - q) / n, by definition."""
    figure = reliability_diagram(torch.full((10,), 0.95), torch.arange(10) > 0)
    (segment,) = figure.axes[0].collections[0].get_segments()
    for end in segment[:, 1]:
        assert (0.9 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 10)
    certain = reliability_diagram(torch.full((10,), 0.95), torch.ones(10, dtype=torch.bool))
    (segment,) = certain.axes[0].collections[0].get_segments()
    assert segment[1, 1] == pytest.approx(1)
    assert 0.6 < segment[0, 1] < 0.8  # ten successes of ten are no certainty


def test_pooled_seeds_do_not_narrow_the_intervals():
    once = reliability_diagram(torch.full((10,), 0.95), torch.arange(10) > 0)
    pooled = reliability_diagram(torch.full((30,), 0.95), (torch.arange(10) > 0).repeat(3), repeats=3)
    segments = [figure.axes[0].collections[0].get_segments()[0] for figure in (once, pooled)]
    np.testing.assert_allclose(*segments)
    assert [bar.get_height() for bar in pooled.axes[1].patches] == [30]


def test_bins_with_few_rows_are_grey_and_the_figure_says_so():
    confidence = torch.cat([torch.full((9,), 0.3), torch.full((10,), 0.9)])
    figure = reliability_diagram(confidence, confidence > 0.5, num_bins=10)
    for axes in figure.axes:
        assert colors(axes) == [FAINT.upper(), IN_COLOR]
    assert "Grey: bins with fewer than 10 rows." in texts(figure)
    many = reliability_diagram(confidence[9:], confidence[9:] > 0.5)
    assert "Grey" not in texts(many)
    repeated = reliability_diagram(confidence[9:], confidence[9:] > 0.5, repeats=2)
    assert colors(repeated.axes[0]) == [FAINT.upper()]
    assert "fewer than 10 different rows" in texts(repeated)


def test_a_binary_event_has_its_own_labels(predictions):
    figure = reliability_diagram(*predictions, event="rain")
    assert figure.axes[0].get_ylabel() == "Observed frequency"
    assert figure.axes[1].get_xlabel() == "Predicted probability of rain"


@pytest.mark.parametrize("size", [1, 2, 3000])
def test_few_and_many_rows_are_drawn(size):
    figure = reliability_diagram(torch.ones(size), torch.ones(size, dtype=torch.bool))
    assert "<text" in to_svg(figure)
    assert max(figure.axes[1].get_yticks()) >= size / 10


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match=r"the shape \[N\] with N > 0, but their shapes are \[0\] and \[0\]"):
        reliability_diagram(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(InputError, match=r"\[3\] and \[2\]"):
        reliability_diagram(torch.ones(3), torch.ones(2, dtype=torch.bool))
    for bad in (1.5, -0.1, torch.nan):
        with pytest.raises(InputError, match=r"probabilities in \[0, 1\]"):
            reliability_diagram(torch.tensor([0.5, bad]), torch.tensor([True, True]))
    with pytest.raises(InputError, match="`repeats` must be at least 1, but it is 0"):
        reliability_diagram(torch.ones(2), torch.ones(2, dtype=torch.bool), repeats=0)
