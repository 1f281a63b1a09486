"""A lock on a run's directory, so that two comparisons never write to it at the same time."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_uq.errors import InputError

LOCK = "run.lock"
"""The file that exists while a comparison runs."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A context that no other process can enter for the same directory. The lock of a killed process is ignored.

    Args:
        directory: An existing directory.

    Raises:
        InputError: Another process is in the context, or a process on another machine may be.
    """
    file = directory / LOCK
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    while not _create(file, mine):
        _check_stale(file)
        file.unlink(missing_ok=True)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _create(file: Path, content: str) -> bool:
    try:
        with file.open("x") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _check_stale(file: Path) -> None:
    try:
        holder: dict[str, Any] = json.loads(file.read_text())
        pid, host = int(holder["pid"]), str(holder["host"])
    except FileNotFoundError:
        return  # it was just released
    except (ValueError, TypeError, KeyError):
        pid, host = 0, ""  # it is being written, or the writing process was killed
    if host == socket.gethostname() and not _is_alive(pid):
        return
    who = f"process {pid} on {host}" if host else "another process"
    raise InputError(
        f"`out`: {who} is writing a comparison to {file.parent}. Wait for it, or choose another `out`. If there is no such process, delete {file}."
    )


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, other than this one: its number may be that of an earlier process, as in a restarted container."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # on Windows, the call below would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it belongs to another user
    return True
