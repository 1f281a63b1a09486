"""Writing files whole or not at all: beside their place first, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """The hidden file beside ``path`` in which it is written.

    Example:
        >>> partial_path(Path("runs/results.json")).name
        '.results.json.partial'
    """
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context that yields a path beside ``path``. The file written there is renamed to ``path`` at the end.

    If the context fails, or the process is killed in it, a file that was at ``path`` stays as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.json"
        >>> with replacing(path) as partial:
        ...     _ = partial.write_text("{}")
        ...     path.exists()
        False
        >>> path.read_text()
        '{}'
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
