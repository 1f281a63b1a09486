"""How much of a comparison is done, and how long the rest will take."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

NEARLY_DONE = 0.95
"""The largest share of a training that counts as done before it is."""


@dataclass
class _Running:
    begun: float
    epochs: int = 0


@dataclass
class Estimate:
    """Learns from finished trainings how long others take.

    A training that has not begun takes as long as those of its method did, or where none is finished, as long as one of any method. A running one is
    expected to take as many epochs as those of its method, or of any method, took, since many stop early.

    Attributes:
        trainings: Number of trainings.
        epochs: Epochs of a training at most.
        done: Number of trainings that an earlier run has done.
        clock: Tells the time in seconds.

    Example:
        >>> now = 0.0
        >>> estimate = Estimate(3, 10, clock=lambda: now)
        >>> estimate.begin("softmax", 0)
        >>> estimate.seconds_left() is None
        True
        >>> now = 4.0
        >>> estimate.end("softmax", 0, epochs=10)
        >>> estimate.seconds_left(), round(estimate.share, 2)
        (8.0, 0.33)
    """

    trainings: int
    epochs: int
    done: int = 0
    clock: Callable[[], float] = time.monotonic
    running: dict[tuple[str, int], _Running] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _taken: dict[str, list[int]] = field(default_factory=dict)
    _most_at_once: int = 1

    def begin(self, method: str, seed: int) -> None:
        """A training begins."""
        self.running[method, seed] = _Running(self.clock())
        self._most_at_once = max(self._most_at_once, len(self.running))

    def epoch(self, method: str, seed: int) -> None:
        """One of its epochs is done."""
        self.running[method, seed].epochs += 1

    def end(self, method: str, seed: int, epochs: int) -> None:
        """It ended, after so many epochs."""
        begun = self.running.pop((method, seed)).begun
        self._seconds.setdefault(method, []).append(self.clock() - begun)
        self._taken.setdefault(method, []).append(epochs)
        self.done += 1

    @property
    def share(self) -> float:
        """The share of the trainings that is done, running ones by their epochs."""
        parts = (self._part(method, one) for (method, _), one in self.running.items())
        return (self.done + sum(parts)) / self.trainings

    def _part(self, method: str, one: _Running) -> float:
        expected = _mean_of(self._taken, method) or self.epochs
        return min(one.epochs / expected, NEARLY_DONE)

    def seconds_left(self) -> float | None:
        """Seconds until all is done; None while nothing is known."""
        left, known = 0.0, {}
        for (method, seed), one in self.running.items():
            elapsed, part = self.clock() - one.begun, self._part(method, one)
            expected = _mean_of(self._seconds, method, others=False)
            if expected is None and part > 0:
                expected = elapsed / part
            if expected is None:
                expected = _mean_of(self._seconds, method)
            if expected is not None:
                known[method, seed] = max(expected, elapsed / NEARLY_DONE)
                left += known[method, seed] - elapsed
        finished = [seconds for one in self._seconds.values() for seconds in one]
        typical = [*finished, *known.values()]
        if not typical:
            return None
        waiting = self.trainings - self.done - len(self.running)
        unknown = len(self.running) - len(known)
        return (left + (waiting + unknown) * statistics.mean(typical)) / self._most_at_once


def _mean_of(
    values: dict[str, list[float]] | dict[str, list[int]], method: str, *, others: bool = True
) -> float | None:
    """The mean of a method's values; where it has none, that of all."""
    found = values.get(method) or ([one for column in values.values() for one in column] if others else [])
    return statistics.mean(found) if found else None


def in_words(seconds: float) -> str:
    """A duration, rounded.

    Example:
        >>> in_words(7.2), in_words(100), in_words(3000), in_words(10_000)
        ('7 s', '2 min', '50 min', '2.8 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
