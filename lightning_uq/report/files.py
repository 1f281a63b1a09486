"""Writing results so that a directory never holds half of them."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_uq.errors import InputError


def writable_directory(path: Path) -> Path:
    """Make a directory and check that it can be written to, before hours of work are lost.

    Raises:
        InputError: The path is a file, or the directory cannot be written to.

    Example:
        >>> writable_directory(Path(tempfile.mkdtemp()) / "runs" / "compare").is_dir()
        True
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        problem = "it is a file" if path.is_file() else error.strerror or str(error)
        raise InputError(f"{path} cannot be used as a directory to write to: {problem}.") from error
    return path


def write_files(directory: Path, files: Mapping[str, bytes], stale: Sequence[str] = ()) -> None:
    """Write all files into a directory, or none: first beside it, then each put in place by a rename.

    Args:
        directory: Where to; it exists.
        files: Contents by file name.
        stale: Patterns of an earlier run's files, removed unless they are among ``files``.

    Example:
        >>> directory = Path(tempfile.mkdtemp())
        >>> write_files(directory, {"results.json": b"{}"})
        >>> [path.name for path in directory.iterdir()]
        ['results.json']
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for pattern in stale:
            for old in directory.glob(pattern):
                if old.name not in files:
                    old.unlink()
        for name in files:
            os.replace(Path(staging) / name, directory / name)  # noqa: PTH105  # says that it overwrites
