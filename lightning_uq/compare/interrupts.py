"""Ends a comparison by a signal, such as that of Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_uq.compare.run import Comparison


class Interrupted(KeyboardInterrupt):
    """A comparison was interrupted. Its completed parts are saved.

    Attributes:
        comparison: The comparison so far. Methods without the records of all seeds have no row.
    """

    def __init__(self, comparison: "Comparison", done: int, total: int, *, can_resume: bool) -> None:
        advice = " Continue with --resume." if can_resume else ""
        super().__init__(f"interrupted after {done} of {total} trainings.{advice}")
        self.comparison = comparison


class Signals:
    """Raises a KeyboardInterrupt at SIGINT and SIGTERM, and records that one occurred."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise the KeyboardInterrupt again, if a signal raised one before.

        It can get lost: C code that checks for an attribute of an object clears any error, and a finalizer only prints it.
        """
        if self.came:
            raise KeyboardInterrupt


@contextmanager
def signals_interrupt() -> Iterator[Signals]:
    """A context in which SIGINT and SIGTERM raise a KeyboardInterrupt; SIGINT only if Python's own handler would.

    A Trainer that catches one ignores SIGINT from then on, so both handlers are restored at the end.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may set signal handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signals)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, signals)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
