"""What a comparison tells of itself while it works."""


class Progress:
    """What :func:`compare` tells while it works. This class listens to nothing; the command line draws a bar.

    With several processes the calls of several trainings alternate, so each call names its training.
    """

    def start(self, trainings: int, epochs: int, done: int) -> None:
        """The work begins: so many trainings of so many epochs at most, of which an earlier run has done some."""

    def note(self, text: str) -> None:
        """A sentence that the user should read now."""

    def training(self, method: str, seed: int) -> None:
        """A training begins."""

    def epoch(self, method: str, seed: int) -> None:
        """One of its epochs is done."""

    def trained(self, method: str, seed: int, epochs: int, seconds: float) -> None:
        """It ended after so many epochs, and the methods that read it are evaluated."""
