"""``docs/references.bib`` as a page, and the citations that lead to it.

A page or a docstring cites ``[@key]`` or ``[@key; @another]``, or the number of a preprint as in "arXiv 1612.01474".
"""

import functools
import html as entities
import re
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parents[1] / "references.bib"
ENTRY = re.compile(r"@(\w+)\{([\w-]+),\n(.*?)\n\}", re.DOTALL)
FIELD = re.compile(r"^  (\w+) = \{(.*)\},?$", re.MULTILINE)
CITATION = re.compile(r"\[(@[\w-]+(?:; @[\w-]+)*)\]")
PREPRINT = re.compile(r"arXiv:? (\d{4}\.\d{4,5})")
# Text that is neither the inside of a tag, nor code, nor a link.
SKIPPED = re.compile(r"(<(pre|code|a)\b.*?</\2>|<[^>]*>)", re.DOTALL)


class Reference(NamedTuple):
    """One entry of the file."""

    key: str
    fields: dict[str, str]

    @property
    def authors(self) -> list[str]:
        """The family names."""
        return [name.split(",")[0].strip("{} ") for name in self.fields["author"].split(" and ")]

    @property
    def short(self) -> str:
        """Such as "Guo et al., 2017"."""
        names = self.authors
        first = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
        return f"{first}, {self.fields['year']}"

    @property
    def link(self) -> str | None:
        """Where it can be read."""
        if "eprint" in self.fields:
            return f"https://arxiv.org/abs/{self.fields['eprint']}"
        return f"https://doi.org/{self.fields['doi']}" if "doi" in self.fields else self.fields.get("url")


@functools.cache
def references() -> dict[str, Reference]:
    """The entries by key.

    Raises:
        ValueError: A key or a preprint stands there twice, or a field that each entry needs is missing.
    """
    found: dict[str, Reference] = {}
    for _, key, body in ENTRY.findall(FILE.read_text()):
        entry = Reference(key, dict(FIELD.findall(body)))
        missing = {"author", "title", "year"} - set(entry.fields)
        if missing or entry.link is None or key in found:
            raise ValueError(f"docs/references.bib: {key} is there twice, or lacks a link or one of {sorted(missing)}.")
        found[key] = entry
    return found


@functools.cache
def preprints() -> dict[str, str]:
    """Key of each arXiv number."""
    found = [(entry.fields["eprint"], key) for key, entry in references().items() if "eprint" in entry.fields]
    if len(dict(found)) < len(found):
        raise ValueError("docs/references.bib: two entries have one arXiv number.")
    return dict(found)


def cited(text: str) -> tuple[set[str], set[str]]:
    """The keys and the arXiv numbers that a text cites."""
    return {key for found in CITATION.findall(text) for key in _keys(found)}, set(PREPRINT.findall(text))


def _keys(found: str) -> list[str]:
    return [key.removeprefix("@") for key in found.split("; ")]


def page() -> str:
    """The page of all references, by the first author's name."""
    lines = [
        "---",
        "hide: [navigation]",
        "---",
        "# References",
        "",
        "Cite the paper of the method that you use. The entries are in `docs/references.bib`.",
        "",
    ]
    for entry in sorted(references().values(), key=lambda entry: (entry.short.lower(), entry.key)):
        fields = {name: entities.escape(re.sub(r"[{}]", "", value)) for name, value in entry.fields.items()}
        people = ", ".join(
            " ".join(reversed([part.strip() for part in name.split(",")])) for name in fields["author"].split(" and ")
        )
        venue = fields.get("booktitle") or fields.get("journal") or fields.get("institution") or "Preprint"
        lines.append(
            f'<p id="{entry.key}" class="reference">{people}. <a href="{entry.link}">{fields["title"]}</a>. '
            f"<em>{venue}</em>, {fields['year']}. <code>{entry.key}</code></p>\n"
        )
    return "\n".join(lines)


def link(html: str, url: str, page: str) -> str:
    """A page whose citations are links to their entries.

    Args:
        html: The page's content.
        url: The address of the references, relative to the page.
        page: The page's path, for the error.

    Raises:
        ValueError: A key is not in the file.
    """

    def from_keys(found: re.Match) -> str:
        unknown = [key for key in _keys(found[1]) if key not in references()]
        if unknown:
            raise ValueError(f"{page} cites {unknown[0]!r}, but docs/references.bib has no such entry.")
        links = [f'<a href="{url}#{key}">{entities.escape(references()[key].short)}</a>' for key in _keys(found[1])]
        return f"[{'; '.join(links)}]"

    def from_preprint(found: re.Match) -> str:
        key = preprints().get(found[1])
        return f'<a href="{url}#{key}">{found[0]}</a>' if key else found[0]

    pieces, start = [], 0
    for skipped in [*SKIPPED.finditer(html), None]:
        text = html[start : skipped.start() if skipped else None]
        pieces.append(PREPRINT.sub(from_preprint, CITATION.sub(from_keys, text)))
        if skipped:
            pieces.append(skipped[0])
            start = skipped.end()
    return "".join(pieces)
