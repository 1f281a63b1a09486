"""Reports the warnings of a training together with the method and the seed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning_uq.compare.progress.progress import Progress

_method: ContextVar[str] = ContextVar("_method")


@contextmanager
def at_work(method: str) -> Iterator[None]:
    """A context in which the method's own callbacks, or its evaluation, run."""
    token = _method.set(method)
    try:
        yield
    finally:
        _method.reset(token)


@contextmanager
def reported_warnings(progress: Progress, method: str, seed: int) -> Iterator[None]:
    """A context whose warnings go to ``progress``, each once, prefixed by the current method and its seed.

    Example:
        >>> class Printing(Progress):
        ...     def warning(self, text): print(text)
        >>> with reported_warnings(Printing(), "softmax", 0), at_work("temperature"):
        ...     warnings.simplefilter("default")
        ...     warnings.warn("T is at its bound.")
        temperature, seed 0: T is at its bound.
    """
    seen: set[str] = set()
    show = warnings.showwarning

    def report(message: Warning | str, *_: Any, **__: Any) -> None:
        text = f"{_method.get()}, seed {seed}: {' '.join(str(message).split())}"
        if text not in seen:
            seen.add(text)
            with warnings.catch_warnings():
                warnings.showwarning = show  # since `progress` may warn itself
                progress.warning(text)

    with warnings.catch_warnings(), at_work(method):
        warnings.showwarning = report
        yield
