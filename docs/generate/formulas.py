"""LaTeX formulas as MathML, which browsers draw themselves, without JavaScript."""

import html as entities
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def render(html: str) -> str:
    """A page whose formulas, which the Markdown extension arithmatex marked, are MathML."""
    html = BLOCK.sub(lambda found: _mathml(found[1], "block"), html)
    return INLINE.sub(lambda found: _mathml(found[1], "inline"), html)


def _mathml(latex: str, display: str) -> str:
    return convert(entities.unescape(latex).strip(), display=display)
