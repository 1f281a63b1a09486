"""The parts that all figures share: colours, headings, legends, and the conversion to PNG and SVG."""

import hashlib
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_uq.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguished with any colour vision; line styles tell a second round of methods from the first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
IN_COLOR, OUT_COLOR, GREY = COLORS[0], COLORS[1], "#666666"
INK, FAINT, BAND, GRID, PAPER = "#1a1a1a", "#8c8c8c", "#e4e4e7", "#dddddd", "#ffffff"

HIGHLIGHTED_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
"""Line styles of the highlighted methods, whose number is at most that of the styles."""

WIDTH = 5.0
"""Width of a figure in inches: 360 units of the SVG, so that a phone shows its text in full size."""

VARIABLES = {
    **{color.lower(): f"series-{i + 1}" for i, color in enumerate(COLORS[:-1])},
    INK: "ink",
    COLORS[-1]: "ink",
    GREY: "muted",
    FAINT: "faint",
    BAND: "band",
    GRID: "grid",
    PAPER: "paper",
}
"""Which CSS variable of the page stands for a colour, so that a figure follows the light and the dark scheme."""

_FONT = "system-ui, sans-serif"
_NBSP = "\N{NO-BREAK SPACE}"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, drawn without a display.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Figures need matplotlib, which is not installed. Install the extra `report`: pip install 'lightning-uq[report]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: "Figure", *, grid: Literal["x", "y", "both"] = "y") -> "Figure":
    """Give a drawn figure the common look: ink, grid, wrapped axis labels, numbers as in tables, no frame on top and right.

    No text is read as a formula, whatever signs a name contains.

    Args:
        figure: The figure.
        grid: Which axes have grid lines.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import ScalarFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if type(axis.get_major_formatter()) is ScalarFormatter:
                axis.set_major_formatter(_grouping_formatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, which="both")
        axes.grid(axis=grid, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelcolor=INK, labelsize=10, which="both")
        for label, length in ((axes.xaxis.label, 42), (axes.yaxis.label, 32)):
            label.set_text("\n".join(wrapped(line, length) for line in label.get_text().split("\n")))
            label.set_fontsize(11)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        if text.get_color() == "black":
            text.set_color(INK)
    return figure


def _grouping_formatter() -> Any:
    from matplotlib.ticker import ScalarFormatter

    class Grouping(ScalarFormatter):
        """Thousands are separated by commas, as in tables."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return re.sub(r"^(\D?)(\d{4,})", lambda found: f"{found[1]}{int(found[2]):,}", super().__call__(x, pos))

    formatter = Grouping(useOffset=False)
    formatter.set_powerlimits((-5, 7))
    return formatter


def wrapped(text: str, length: int) -> str:
    """A text in lines of a length; the words in a bracket stay together.

    Example:
        >>> wrapped("NLL minus ensemble (← better)", 24).splitlines()
        ['NLL minus ensemble', '(← better)']
    """
    together = re.sub(r"\([^)]*\)", lambda found: found[0].replace(" ", _NBSP), text)
    return textwrap.fill(together, length).replace(_NBSP, " ")


def heading(axes: Any, title: str, notes: Sequence[str] = (), *, share: float = 1.0) -> None:
    """A title above the axes, and below it a smaller line for each note; the figure grows by their height.

    ``share`` is the part of the usual width that the axes have.
    """
    titles = textwrap.wrap(title, int(38 * share))
    lines = [line for note in notes if note for line in textwrap.wrap(note, int(52 * share))]
    if lines:
        axes.annotate(
            "\n".join(lines),
            (0, 1),
            (0, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9.5,
            linespacing=1.25,
            verticalalignment="bottom",
        )
    if title:
        pad = 6 + 13.2 * len(lines)
        axes.set_title("\n".join(titles), loc="left", fontsize=11.5, fontweight="bold", pad=pad)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * len(titles) + 0.18 * len(lines))


def shortened(name: str, length: int = 26) -> str:
    """A method's name, cut off where it is too long for an axis.

    Example:
        >>> shortened("relative_mahalanobis"), shortened("softmax, energy, relative_mahalanobis")
        ('relative_mahalanobis', 'softmax, energy, relative…')
    """
    return name if len(name) <= length else name[: length - 1] + "…"


def legend_below(figure: "Figure", handles: Sequence[Any]) -> None:
    """A legend in two columns under the axes, where it covers nothing; the figure grows by its height.

    A method's name may begin with an underscore or contain ``$``: it is shown as it is.
    """
    places = [str(i) for i in range(len(handles))]  # matplotlib leaves out labels that begin with an underscore
    legend = figure.legend(
        handles,
        places,
        loc="outside lower center",
        ncols=min(2, len(handles)),
        frameon=False,
        fontsize=10,
        handlelength=2.6,
    )
    lines = []
    for handle in handles:
        name = handle.get_label().replace("@", " @")  # `strategy@method` breaks between the two, if it has to
        parts = textwrap.wrap(name, 21, break_on_hyphens=False, max_lines=4, placeholder="…")
        lines.append([part.replace(" @", "@") for part in parts])
    for text, label in zip(legend.get_texts(), lines, strict=True):
        text.set_text("\n".join(label))
    figure.set_figheight(figure.get_figheight() + 0.1 * sum(map(len, lines)))


def line_styles(methods: Sequence[str], highlighted: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method with its line's style, in the order in which lines are drawn: grey ones first, below the others.

    Args:
        methods: All methods.
        highlighted: Those in colour; None: the first four.

    Raises:
        InputError: More methods are highlighted than there are styles, or an unknown one is.
    """
    most = len(HIGHLIGHTED_LINES)
    chosen = list(dict.fromkeys(methods[:most] if highlighted is None else highlighted))
    unknown = [method for method in chosen if method not in methods]
    if unknown or len(chosen) > most:
        raise InputError(
            f"`highlighted` must name at most {most} of the methods {', '.join(methods)}, but it is {', '.join(chosen)}."
        )
    others = [method for method in methods if method not in chosen]
    for method in others:
        label = "" if method != others[0] else others[0] if len(others) == 1 else f"{len(others)} other methods"
        yield method, {"color": FAINT, "linewidth": 0.8, "linestyle": "-", "label": label or "_other"}
    for i, method in enumerate(chosen):
        yield (
            method,
            {"color": COLORS[i], "linewidth": 1.8, "linestyle": HIGHLIGHTED_LINES[i], "label": method, "zorder": 3},
        )


def methods_legend(figure: "Figure", lines: Mapping[str, Any]) -> None:
    """The legend of lines that were drawn with :func:`line_styles`: highlighted methods, then one entry for the grey ones."""
    shown = [line for line in lines.values() if line.get_label() != "_other"]
    legend_below(figure, sorted(shown, key=lambda line: line.get_color() == FAINT))


def to_png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: "Figure") -> str:
    """The figure as an ``<svg>`` element for an HTML page, the same for the same figure.

    Its text is text, its colours are CSS variables (:data:`VARIABLES`) with the light colours as fallbacks, and its ids
    differ from those of every other figure. It has no size: it fills the width that the page gives it.

    Example:
        >>> figure = new_figure(2, 1)
        >>> _ = figure.text(0, 0, "a < b")
        >>> svg = to_svg(figure)
        >>> svg[:31], "a &lt; b" in svg
        ('<svg viewBox="0 0 144 72" xmlns', True)
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_uq"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    _, width, height = (float(number) for number in re.search(r'viewBox="0 (0) ([\d.]+) ([\d.]+)"', text).groups())  # type: ignore[union-attr]
    body = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.S
    )
    body = re.sub(r"<defs>\s*</defs>\s*", "", body.replace("xlink:href", "href"))
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)

    # Only the ids that something refers to are kept. Their names come from the contents, which differ between figures.
    prefix = "f" + hashlib.sha256(body.encode()).hexdigest()[:10]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", body)

    body = re.sub(r"(style=\"[^\"]*font: [^\"]*?[\d.]+px) [^;\"]*", rf"\1 {_FONT}", body)  # matplotlib 3.7
    body = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONT}", body)
    body = re.sub(r'<text style="(?![^"]*fill:)', f'<text style="fill: {INK}; ', body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, body)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg" '
        f'stroke-linejoin="round" stroke-linecap="butt">{body.strip()}'
    )


def _variable(found: re.Match[str]) -> str:
    attribute, color = found.groups()
    return f"{attribute}: var(--{VARIABLES[color]}, {color})" if color in VARIABLES else f"{attribute}: {color}"
