"""Docstrings as mkdocstrings reads them: an extension that it loads by this file's path."""

import griffe

from docs.generate.api import readable


class Readable(griffe.Extension):
    """Applies :func:`readable` to every docstring that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
