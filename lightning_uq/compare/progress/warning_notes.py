"""Warnings of a training, told with the method and the seed that they are about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning_uq.compare.progress.progress import Progress

_method: ContextVar[str] = ContextVar("_method")


@contextmanager
def at_work(method: str) -> Iterator[None]:
    """A context in which a method's own callbacks, or its evaluation, run."""
    token = _method.set(method)
    try:
        yield
    finally:
        _method.reset(token)


@contextmanager
def told_warnings(progress: Progress, method: str, seed: int) -> Iterator[None]:
    """A context whose warnings go to ``progress``, each once, with the method that is at work and its seed in front.

    Example:
        >>> class Printing(Progress):
        ...     def warning(self, text): print(text)
        >>> with told_warnings(Printing(), "softmax", 0), at_work("temperature"):
        ...     warnings.simplefilter("default")
        ...     warnings.warn("T is at its bound.")
        temperature, seed 0: T is at its bound.
    """
    seen: set[str] = set()
    show = warnings.showwarning

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        text = f"{_method.get()}, seed {seed}: {' '.join(str(message).split())}"
        if text not in seen:
            seen.add(text)
            with warnings.catch_warnings():
                warnings.showwarning = show  # `progress` may warn itself
                progress.warning(text)

    with warnings.catch_warnings(), at_work(method):
        warnings.showwarning = tell
        yield
