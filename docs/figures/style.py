"""One style for all pictures: colours that colour-blind readers can tell apart, on a transparent ground.

The colours are Okabe and Ito's, with a lighter blue, since theirs is hard to see in the dark. Text and axes take the colour of the page's
text, so a picture can be read in light and in dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#2b8fd0", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
TEXT = "#010203"  # stands for the colour of the page's text
GREY = "#8a8f98"  # readable on white and on black


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Matplotlib's settings while a picture is drawn; ``name`` makes the identifiers in it unique."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "savefig.transparent": True,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, PINK, YELLOW, SKY]),
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        **dict.fromkeys(
            ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], TEXT
        ),
    }
    with mpl.rc_context(settings):
        yield


def panels(number: int = 1, *, height: float = 2.8, **options):
    """A figure as wide as a page, and its axes."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots(1, number, **options)


def svg(figure: Figure) -> str:
    """The picture as the element ``<svg>`` of a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"font: [\d.]+px [^;\"]*", _font, text[text.index("<svg ") :])
    return text.replace(TEXT, "currentColor")


def _font(found: re.Match) -> str:
    """The size of a text alone; its font is the page's."""
    return f"font-size: {found[0].split()[1]}"
