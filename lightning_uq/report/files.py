"""Writing results into a directory: all of them, or none."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lightning_uq.errors import InputError
from lightning_uq.writing import replacing


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
        if path.is_file():
            raise InputError(f"{path} is a file, not a directory.") from error
        raise InputError(f"The directory {path} cannot be written to: {error.strerror or error}.") from error
    return path


def write_files(directory: Path, files: Mapping[str, bytes], stale: Sequence[str] = ()) -> None:
    """Write all files into a directory, or none of them.

    Args:
        directory: Where to write; it exists.
        files: Contents by file name.
        stale: Patterns of an earlier run's files, which are removed unless they are among ``files``.

    Example:
        >>> directory = Path(tempfile.mkdtemp())
        >>> write_files(directory, {"results.json": b"{}"})
        >>> [path.name for path in directory.iterdir()]
        ['results.json']
    """
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(replacing(directory / name)).write_bytes(content)
        for pattern in stale:
            for old in directory.glob(pattern):
                if old.name not in files:
                    old.unlink()
