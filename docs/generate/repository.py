"""Markdown files outside ``docs/`` that the site shows too, and the links that lead there and back."""

import functools
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = (
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/drift_study.md",
    "benchmarks/regression_defaults.md",
    "benchmarks/results.md",
    "benchmarks/seed_differences.md",
    "examples/deploy/README.md",
)
FOLDER = "repository"
LINK = re.compile(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def pages() -> dict[str, Callable[[], str]]:
    """Path of each file in the site, and the function that reads it."""
    return {f"{FOLDER}/{path}": functools.partial((ROOT / path).read_text) for path in SHOWN}


def relink(markdown: str, page: str) -> str:
    """A page whose relative links, which are right in the repository, are right in the site.

    Args:
        markdown: The text.
        page: Its path in the site.
    """
    beside = page.startswith("notebooks/")  # a folder beside docs/ in the repository, below it in the site
    source = page if beside else page.removeprefix(f"{FOLDER}/") if page.startswith(f"{FOLDER}/") else f"docs/{page}"

    def linked(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        if target in SHOWN:
            target = f"{FOLDER}/{target}"
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return found[0]  # mkdocs says that there is no such page
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{found[2] or ''})"

    return LINK.sub(linked, markdown)
