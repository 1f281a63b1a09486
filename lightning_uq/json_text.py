"""States as JSON text, with the name and version of their format."""

import json
from typing import Any

from lightning_uq.errors import InputError, without_period


def read_json(text: str, kind: str, version: int) -> dict[str, Any]:
    """Read a text that a ``to_json`` method of this package wrote.

    Raises:
        InputError: The text is not such JSON, has another format, or another version of it.
    """
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`text` must be JSON that `to_json` wrote, but it cannot be read: {without_period(error)}."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        raise InputError(f"`text` must be JSON of {kind}, but it holds {found or type(content).__name__}.")
    if content.get("version") != version:
        raise InputError(
            f"`text` has version {content.get('version')} of the format {kind}, but this version of lightning_uq reads {version}. Use the "
            "version of lightning_uq that wrote it."
        )
    return dict(content)
