"""Estimates the completed share of a comparison, and the remaining time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

NEARLY_DONE = 0.95
"""The largest completed share of a running training."""


@dataclass
class _Running:
    begun: float
    epochs: int = 0


@dataclass
class Estimate:
    """Learns the time of trainings from finished ones.

    A training that has not started is expected to take as long as those of its method, or, if none is finished, as those of any method. A running one is
    expected to take as many epochs as those of its method, or of any method, since many stop early.

    Attributes:
        trainings: Number of trainings.
        epochs: Maximum number of epochs of a training.
        done: Number of trainings done by an earlier run.
        clock: Returns the time in seconds.

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
        """A training starts."""
        self.running[method, seed] = _Running(self.clock())
        self._most_at_once = max(self._most_at_once, len(self.running))

    def epoch(self, method: str, seed: int) -> None:
        """One epoch of a training is done."""
        self.running[method, seed].epochs += 1

    def end(self, method: str, seed: int, epochs: int) -> None:
        """A training has ended, after ``epochs`` epochs."""
        begun = self.running.pop((method, seed)).begun
        self._seconds.setdefault(method, []).append(self.clock() - begun)
        self._taken.setdefault(method, []).append(epochs)
        self.done += 1

    @property
    def share(self) -> float:
        """The completed share of the trainings; running ones count by their epochs."""
        parts = (self._part(method, one) for (method, _), one in self.running.items())
        return (self.done + sum(parts)) / self.trainings

    def _part(self, method: str, one: _Running) -> float:
        expected = _mean_of(self._taken, method) or self.epochs
        return min(one.epochs / expected, NEARLY_DONE)

    def seconds_left(self) -> float | None:
        """Seconds until all trainings are done; None if unknown."""
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
    """The mean of a method's values, or, if it has none, that of all values."""
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
