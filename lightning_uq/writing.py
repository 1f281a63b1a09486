"""Writing files whole or not at all: into a hidden file beside the target, which is then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """The hidden file beside ``path`` into which it is written.

    Example:
        >>> partial_path(Path("runs/results.json")).name
        '.results.json.partial'
    """
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context that yields a path beside ``path``. At the end, the file written there is renamed to ``path``.

    If the context fails, or the process is killed inside it, an existing file at ``path`` stays as it was.

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
