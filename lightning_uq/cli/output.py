"""The console and the directories that commands write to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_uq.cli.errors import missing_extra
from lightning_uq.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False) -> "Console":
    """The console for tables, or with ``stderr`` for progress.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing_extra("rich") from error
    console = Console(stderr=stderr)
    if not stderr and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or a pipe has no width, for which rich would take 80
    return console


@contextmanager
def removing_new_directories(*paths: Path) -> Iterator[None]:
    """A context that removes the empty directories that it created if it fails."""
    made = [directory for path in paths for directory in (path, *path.parents) if not directory.exists()]
    try:
        yield
    except BaseException:
        for directory in made:
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
        raise


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """A context that writes figures and results to a directory. If it fails, the directories that it created are removed.

    Raises:
        InputError: The directory cannot be written to.
        MissingExtraError: A package that the results need is not installed. Both are raised before the work begins.
    """
    from lightning_uq.report import jinja_environment, new_figure

    new_figure(1, 1)
    jinja_environment()
    with removing_new_directories(path):
        check_writable(path)
        yield


def check_writable(directory: Path) -> None:
    """Create the directory of the option `out`, and check that it can be written to.

    Raises:
        InputError: It cannot.
    """
    from lightning_uq.report import writable_directory

    try:
        writable_directory(directory)
    except InputError as error:
        raise InputError(f"`out`: {error}") from error
