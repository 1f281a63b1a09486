"""Progress of a comparison: a bar on a terminal, or else one plain line per training."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lightning_uq.compare.progress.estimate import Estimate, in_words
from lightning_uq.compare.progress.progress import Progress


class TerminalProgress(Progress):
    """A context manager that shows the current trainings, the completed share, and the remaining time.

    Args:
        console: The console for the output.
        unit: The unit of a training's length.
    """

    def __init__(self, console: Console, unit: str = "epochs") -> None:
        self._console, self._unit = console, unit
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(20),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._estimate = Estimate(0, 0)
        self._trials: dict[tuple[str, int], str] = {}
        self._task = self._bar.add_task("reading the data", total=None, count="", left="")

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, trainings: int, epochs: int, done: int) -> None:
        """Set the bar's length."""
        self._estimate = Estimate(trainings, epochs, done)
        self._bar.update(self._task, total=1.0)
        self._show()

    def note(self, text: str) -> None:
        """Print a note above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warning(self, text: str) -> None:
        """Print a warning like a note."""
        self.note(text)

    def trial(self, method: str, seed: int, number: int, count: int) -> None:
        """Store the name of the next training."""
        self._trials[method, seed] = f"trial {number} of {count} of {method}, seed {seed}"

    def _name(self, method: str, seed: int) -> str:
        return self._trials.get((method, seed), f"{method}, seed {seed}")

    def training(self, method: str, seed: int) -> None:
        """Show the name of the training that starts."""
        self._estimate.begin(method, seed)
        self._show()

    def epoch(self, method: str, seed: int) -> None:
        """Advance the bar by an epoch."""
        self._estimate.epoch(method, seed)
        self._show()

    def trained(self, method: str, seed: int, epochs: int, seconds: float) -> None:
        """Advance the bar to the end of the training. Without a bar, print a line about the training."""
        estimate = self._estimate
        estimate.end(method, seed, epochs)
        self._show()
        if self._bar.disable:
            left = estimate.seconds_left() if estimate.done < estimate.trainings else None
            rest = "" if left is None else f", about {in_words(left)} left"
            self.note(
                f"{estimate.done}/{estimate.trainings} {self._name(method, seed)}: {epochs} {self._unit} in {seconds:.1f} s{rest}"
            )
        self._trials.pop((method, seed), None)

    def _show(self) -> None:
        estimate = self._estimate
        running, left = estimate.running, estimate.seconds_left()
        names = [self._name(method, seed) for method, seed in running]
        count = f"{estimate.done}/{estimate.trainings} trainings"
        if len(running) == 1:
            (one,) = running.values()
            count += f", {one.epochs}/{estimate.epochs} {self._unit}"
        self._bar.update(
            self._task,
            description=names[0] if len(names) == 1 else f"{len(names)} trainings at the same time" if names else "",
            completed=estimate.share if estimate.trainings else 0.0,
            count=count,
            left="" if left is None else f"about {in_words(left)} left",
        )
