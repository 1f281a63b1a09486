"""A progress line on a terminal: the number of rows done."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text


class _RowsColumn(ProgressColumn):
    """``120,000 rows, 85,000 rows/s``."""

    def render(self, task: Task) -> Text:
        """The text."""
        speed = f", {task.speed:,.0f} rows/s" if task.speed else ""
        return Text(f"{int(task.completed):,} rows{speed}")


class ScoreProgress:
    """The line; a context manager that is called with the rows done and those of all, or None. Without a terminal, nothing is shown.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            BarColumn(),
            _RowsColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "ScoreProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total)
