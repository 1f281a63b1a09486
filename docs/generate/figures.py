"""Figures of the pages: each file of ``docs/figures/`` with a function ``draw`` is one picture, drawn while the site is built."""

import functools
import html as entities
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "figures"
IMAGE = re.compile(r'<img alt="([^"]*)" src="(?:[^"]*/)?figures/(\w+)\.svg"[^>]*>')


def files() -> dict[str, Callable[[], str]]:
    """Path of each picture in the site, and the function that draws it."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef draw(" in path.read_text())
    return {f"figures/{name}.svg": functools.partial(svg, name) for name in names}


@functools.cache
def svg(name: str) -> str:
    """The picture that ``docs/figures/NAME.py`` draws."""
    style = importlib.import_module("docs.figures.style")
    with style.applied(name), torch.random.fork_rng():
        torch.manual_seed(0)  # the same picture in every build, whatever was drawn before it
        return style.svg(importlib.import_module(f"docs.figures.{name}").draw())


def inline(html: str) -> str:
    """A page that holds its pictures itself, so that they take the colour of its text, in light and dark."""
    return IMAGE.sub(_inlined, html)


def _inlined(found: re.Match) -> str:
    label = entities.escape(entities.unescape(found[1]), quote=True)
    picture = svg(found[2]).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<span class="figure">{picture}</span>'
