"""The progress reports of a comparison."""

import warnings


class Progress:
    """Receives the progress of :func:`compare`. This class ignores it; the command line draws a bar.

    With several processes, the calls of several trainings alternate, so each call names its training.
    """

    def start(self, trainings: int, epochs: int, done: int) -> None:
        """The work starts, with a number of trainings, their maximum number of epochs, and the number of trainings already done."""

    def note(self, text: str) -> None:
        """A note for the user."""

    def warning(self, text: str) -> None:
        """A warning of a training, with its method and seed. This class issues it as a Python warning."""
        warnings.warn(text, stacklevel=2)

    def trial(self, method: str, seed: int, number: int, count: int) -> None:
        """The next training of a method with this seed is trial ``number`` of ``count`` of tuning."""

    def training(self, method: str, seed: int) -> None:
        """A training starts."""

    def epoch(self, method: str, seed: int) -> None:
        """One epoch of a training is done."""

    def trained(self, method: str, seed: int, epochs: int, seconds: float) -> None:
        """A training has ended after ``epochs`` epochs, and the methods that use it are evaluated."""
