"""The pages of the API: every name of ``tests/api.txt``, each object once, on the page of the folder that exports it."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

NAMES = Path(__file__).parents[2] / "tests" / "api.txt"
PACKAGE = "lightning_uq"
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


@functools.cache
def rooms() -> dict[str, dict[str, object]]:
    """The public objects of each folder by name; those of the package itself under the empty name."""
    found: dict[str, dict[str, object]] = {}
    for line in NAMES.read_text().splitlines():
        room, name = line.split("(")[0].rsplit(".", 1)
        found.setdefault(room.removeprefix(PACKAGE).lstrip("."), {})[name] = getattr(
            importlib.import_module(room), name
        )
    return found


def pages() -> dict[str, Callable[[], str]]:
    """Path of each page in the site, and the function that writes it."""
    return {"api/index.md": _index} | {f"api/{room}.md": functools.partial(_page, room) for room in rooms() if room}


def _home(name: str, thing: object) -> str:
    """The folder whose page documents an object of the package itself."""
    return next((room for room, names in rooms().items() if room and names.get(name) is thing), "")


def readable(text: str) -> str:
    """A docstring, in Google's style with roles of Sphinx, as Markdown: its example is one, roles are code, and a colon before a block is single.

    Args:
        text: The docstring.
    """
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = ROLE.sub(lambda found: f"`{found[1].removeprefix('lightning_uq.')}`", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _summary(thing: object) -> str:
    """The first line of a docstring."""
    return readable(inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _index() -> str:
    names = rooms()[""]
    lines = [
        "# API",
        "",
        "The names that `lightning_uq` itself exports. Each folder has a page of its own.",
        "",
        "| | |",
        "|---|---|",
    ]
    own = []
    for name, thing in names.items():
        if inspect.ismodule(thing):
            lines.append(f"| [`{name}`]({name}.md) | {_summary(thing)} |")
            continue
        home = _home(name, thing)
        own += [] if home else [name]
        place = "" if name in own else f'<a id="{PACKAGE}.{name}"></a>'  # its full name leads here
        lines.append(f"| {place}[`{name}`][{'.'.join(filter(None, [PACKAGE, home, name]))}] | {_summary(thing)} |")
    return "\n".join(lines + [""] + [f"::: {PACKAGE}.{name}\n" for name in own])


def _page(room: str) -> str:
    module = importlib.import_module(f"{PACKAGE}.{room}")
    lines = [f"# `{module.__name__}`", "", _summary(module), ""]
    return "\n".join(lines + [f"::: {module.__name__}.{name}\n" for name in rooms()[room]])
