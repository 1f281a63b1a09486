"""What a comparison tells of itself while it works."""

import warnings


class Progress:
    """What :func:`compare` tells while it works. This class listens to nothing; the command line draws a bar.

    With several processes the calls of several trainings alternate, so each call names its training.
    """

    def start(self, trainings: int, epochs: int, done: int) -> None:
        """The work begins: so many trainings of so many epochs at most, of which an earlier run has done some."""

    def note(self, text: str) -> None:
        """A sentence that the user should read now."""

    def warning(self, text: str) -> None:
        """A warning of a training, with its method and seed. This class warns as Python does."""
        warnings.warn(text, stacklevel=2)

    def trial(self, method: str, seed: int, number: int, count: int) -> None:
        """The next training of a method with this seed is a trial of tuning: the number-th of so many."""

    def training(self, method: str, seed: int) -> None:
        """A training begins."""

    def epoch(self, method: str, seed: int) -> None:
        """One of its epochs is done."""

    def trained(self, method: str, seed: int, epochs: int, seconds: float) -> None:
        """It ended after so many epochs, and the methods that read it are evaluated."""
