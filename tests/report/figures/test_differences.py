import itertools

import pytest

from lightning_uq.errors import InputError
from lightning_uq.report import difference_figure, to_svg
from lightning_uq.report.figures.drawing import FAINT, PAPER

DIFFERENCES = {"worse": (0.3, 0.1, 0.5), "better": (-0.2, -0.3, -0.1), "close": (0.01, -0.1, 0.12)}


def draw(**changes):
    arguments = {"metric": "NLL", "reference": "softmax", "better": "lower", "tied": {"close"}, **changes}
    return difference_figure(arguments.pop("differences", DIFFERENCES), **arguments)


def names(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_each_method_has_a_point_and_an_interval():
    figure = draw()
    zero, *drawn = figure.axes[0].lines
    assert list(zero.get_xdata()) == [0, 0]
    assert names(figure) == ["worse", "close", "better"]  # upwards
    for y, name in enumerate(names(figure)):
        interval, point = drawn[2 * y : 2 * y + 2]
        difference, lower, upper = DIFFERENCES[name]
        assert list(interval.get_xdata()) == [lower, upper]
        assert (list(point.get_xdata()), list(point.get_ydata())) == ([difference], [y])


def test_better_is_up_and_said_on_the_axis():
    assert draw().axes[0].get_xlabel() == "NLL minus softmax (← better)"
    higher = draw(better="higher", metric="Accuracy")
    assert names(higher) == ["better", "close", "worse"]
    assert higher.axes[0].get_xlabel().replace("\n", " ") == "Accuracy minus softmax (better →)"


def test_tied_methods_are_grey_and_hollow():
    figure = draw()
    points = dict(zip(names(figure), figure.axes[0].lines[2::2], strict=True))
    assert [name for name, point in points.items() if point.get_color() == FAINT] == ["close"]
    assert [name for name, point in points.items() if point.get_markerfacecolor() == PAPER] == ["close"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["differs from softmax", "tied with softmax"]


def test_twenty_methods_have_room():
    figure = draw(differences={f"a_rather_long_name_of_method_{i}": (i, i - 1, i + 1) for i in range(20)}, tied=())
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for lower, upper in itertools.pairwise(boxes))
    assert "…" in to_svg(figure)
    assert figure.axes[0].get_window_extent().width > 0.4 * figure.bbox.width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"differences": {}, "tied": ()}, "at least one method"),
        ({"differences": {"a": (0.1, 0.2, 0.3)}, "tied": ()}, r"`differences\['a'\]` must be a difference"),
        ({"differences": {"a": (0.1, 0.0, float("inf"))}, "tied": ()}, r"`differences\['a'\]`"),
        ({"differences": {"a": (float("nan"), 0.0, 1.0)}, "tied": ()}, r"`differences\['a'\]`"),
        ({"tied": {"nobody"}}, "`tied` names methods that `differences` does not have: nobody"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        draw(**changes)


def test_the_reference_may_be_among_the_tied():
    assert names(draw(tied={"close", "softmax"})) == ["worse", "close", "better"]


def test_the_direction_is_not_torn_apart():
    for reference in ("ensemble", "relative_mahalanobis", "a_name_of_26_characters_00"):
        lines = draw(reference=reference).axes[0].get_xlabel().splitlines()
        assert any("(← better)" in line for line in lines)


def test_several_methods_on_one_line_have_all_their_names():
    family = "softmax, energy, density, relative_mahalanobis, knn, vim"
    figure = draw(differences={family: (0.3, 0.1, 0.5), **DIFFERENCES}, tied={family})
    assert [" ".join(name.split()) for name in names(figure)] == [family, "worse", "close", "better"]
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for lower, upper in itertools.pairwise(boxes))


def test_large_numbers_are_grouped_as_in_tables():
    figure = draw(differences={"a": (-20_000, -30_000, 12_000)}, tied=())
    figure.draw_without_rendering()
    assert "−30,000" in [label.get_text() for label in figure.axes[0].get_xticklabels()]
