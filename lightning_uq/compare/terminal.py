"""Progress of a comparison: a bar on a terminal, elsewhere one plain line a training."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lightning_uq.compare.training import Progress


class TerminalProgress(Progress):
    """Shows what is trained, and how much of the work is done; a context manager.

    Args:
        console: Where to.
        unit: What a training's length is counted in.
    """

    def __init__(self, console: Console, unit: str = "epochs") -> None:
        self._console, self._unit = console, unit
        self._bar = Bar(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._trainings = self._epochs = self._trained = 0
        self._task = self._bar.add_task("reading the data", total=None)
        self._name = ""

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, trainings: int, epochs: int) -> None:
        """Set the bar's length: all epochs of all trainings."""
        self._trainings, self._epochs = trainings, epochs
        self._bar.update(self._task, total=trainings * epochs)

    def training(self, method: str, seed: int) -> None:
        """Name the training that begins."""
        self._name = f"{method}, seed {seed}"
        self._bar.update(self._task, description=self._name)

    def epoch(self) -> None:
        """Move the bar by an epoch."""
        self._bar.advance(self._task)

    def trained(self, epochs: int, seconds: float) -> None:
        """Move the bar by the epochs that an early stop left out; without a bar, tell of the training."""
        self._trained += 1
        self._bar.update(self._task, completed=self._trained * self._epochs)
        if self._bar.disable:
            count = f"{self._trained}/{self._trainings}"
            self._console.print(f"{count} {self._name}: {epochs} {self._unit} in {seconds:.1f} s", highlight=False)
