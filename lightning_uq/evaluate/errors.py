"""Errors that name the argument at fault."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

from lightning_uq.errors import UQError
from lightning_uq.evaluate.settings import Settings

_ARGUMENT = re.compile(r"`(\w+)`")


@contextmanager
def naming_argument(argument: str, aliases: Mapping[str, str] | None = None) -> Iterator[None]:
    """A context whose errors name ``argument``, an argument of :class:`Settings`, unless they name another one.

    Args:
        argument: The argument that the body reads.
        aliases: Argument names in the errors of the body, and the corresponding arguments of the settings.

    Raises:
        UQError: The error of the body.

    Example:
        >>> with naming_argument("data", {"path": "data"}):
        ...     raise UQError("`path` must be a file.")
        Traceback (most recent call last):
        lightning_uq.errors.UQError: `data` must be a file.
    """
    try:
        yield
    except UQError as error:
        known = {field.name for field in fields(Settings)}
        text = _ARGUMENT.sub(lambda found: f"`{(aliases or {}).get(found[1], found[1])}`", str(error))
        error.args = (text if known.intersection(_ARGUMENT.findall(text)) else f"`{argument}`: {text}",)
        raise
