"""The notebooks as pages of the site, and a gallery of their figures."""

import base64
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat

FOLDER = Path(__file__).parents[2] / "notebooks"
CAPTION = re.compile(r"\*Figure (\d+)\. (.+)\*", re.DOTALL)
SHOWN_LINES = 40
"""Lines of printed output that a page shows."""


class Shown(NamedTuple):
    """One figure of a notebook.

    Attributes:
        path: Its place in the site.
        caption: The text below it.
        png: The picture.
    """

    path: str
    caption: str
    png: bytes


@functools.cache
def notebooks() -> dict[str, nbformat.NotebookNode]:
    """The notebooks by name, in their order."""
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))}


def title(name: str) -> str:
    """The first line of a notebook."""
    line: str = notebooks()[name].cells[0].source.splitlines()[0]
    return line.removeprefix("# ")


@functools.cache
def figures(name: str) -> tuple[Shown, ...]:
    """The figures of a notebook with their captions: the cell after each begins with one.

    Raises:
        ValueError: A figure has no caption.
    """
    cells, found = notebooks()[name].cells, []
    for i, cell in enumerate(cells):
        for picture in _pictures(cell):
            after = cells[i + 1].source if i + 1 < len(cells) else ""
            caption = CAPTION.fullmatch(after.strip())
            if caption is None or int(caption[1]) != len(found) + 1:
                raise ValueError(
                    f"notebooks/{name}.ipynb: figure {len(found) + 1} has no caption in the cell below it."
                )
            found.append(Shown(f"notebooks/{name}_{len(found) + 1}.png", " ".join(caption[2].split()), picture))
    return tuple(found)


def _pictures(cell: nbformat.NotebookNode) -> Iterator[bytes]:
    for output in cell.get("outputs", []):
        if png := output.get("data", {}).get("image/png"):
            yield base64.b64decode(png)


def files() -> dict[str, Callable[[], str | bytes]]:
    """Path of each page and picture in the site, and the function that makes it."""
    pages: dict[str, Callable[[], str | bytes]] = {"notebooks/index.md": gallery}
    for name in notebooks():
        pages[f"notebooks/{name}.md"] = functools.partial(page, name)
        pages |= {shown.path: functools.partial(bytes, shown.png) for shown in figures(name)}
    return pages


def gallery() -> str:
    """The page of all figures, each of which leads to its notebook."""
    lines = [
        "# Notebooks",
        "",
        "Each notebook runs from a clone, and takes at most two minutes on two cores. The one on DDU skips a section if MNIST and FashionMNIST do not "
        "lie in `data/`. Their figures, with links to the pages:",
        "",
    ]
    for name in notebooks():
        lines += [f"## [{title(name)}]({name}.md)", "", '<div class="gallery" markdown>', ""]
        for shown in figures(name):
            picture = Path(shown.path).name
            lines += ['<figure markdown="span">', f"[![{_plain(shown.caption)}]({picture})]({name}.md)"]
            lines += [f"<figcaption>{shown.caption}</figcaption>", "</figure>", ""]
        lines += ["</div>", ""]
    return "\n".join(lines)


def page(name: str) -> str:
    """A notebook as a page: its text, code, printed output and figures."""
    shown = iter(figures(name))
    lines = []
    for i, cell in enumerate(notebooks()[name].cells):
        if cell.cell_type == "markdown":
            lines += [_linked(cell.source), ""]
            if i == 0:
                lines += [f"*This page is `notebooks/{name}.ipynb`, which you can run.*", ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        for output in cell.outputs:
            if output.get("data", {}).get("image/png"):
                figure = next(shown)
                lines += [f"![{_plain(figure.caption)}]({Path(figure.path).name})", ""]
            elif text := output.get("text") or output.get("data", {}).get("text/plain"):
                printed = text.rstrip().splitlines()
                cut = ["..."] if len(printed) > SHOWN_LINES else []
                lines += ["```text", *printed[:SHOWN_LINES], *cut, "```", ""]
    return "\n".join(lines)


def _linked(markdown: str) -> str:
    """Text whose links between notebooks lead to their pages."""
    return re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", markdown)


def _plain(caption: str) -> str:
    return re.sub(r"[\[\]`*]", "", caption)
