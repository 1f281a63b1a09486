"""Ending a comparison by a signal, such as that of Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_uq.compare.run import Comparison


class Interrupted(KeyboardInterrupt):
    """A comparison was interrupted. What is complete is there.

    Attributes:
        comparison: The comparison so far. Methods that lack the record of a seed have no row.
    """

    def __init__(self, comparison: "Comparison", done: int, total: int, *, can_resume: bool) -> None:
        advice = " Go on with --resume." if can_resume else ""
        super().__init__(f"interrupted after {done} of {total} trainings.{advice}")
        self.comparison = comparison


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """A context in which SIGTERM does what SIGINT does: it raises a KeyboardInterrupt.

    A Trainer that catches one ignores SIGINT from then on, so the handlers of both are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what signals do
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
