"""Comparisons in processes of their own, which tests interrupt and kill."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.preloaded import Script, Server

ROOT = Path(__file__).parents[2]

# A shell's background processes, and their children, ignore the signal unless they say so.
_MAIN = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    from lightning_uq.cli import main
    sys.exit(main(sys.argv[1:]))
"""

COMMAND = ("compare", "--data", "diabetes", "--max-epochs", "2", "--seeds", "2", "--out", "run")
"""A comparison of seconds, without its methods."""

TIMES = ("train_seconds", "ms_per_1000")


def start(folder, *arguments):
    """A command in a process, in a folder."""
    (folder / "main.py").write_text(_MAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=folder, env=environment, text=True, stdout=-1, stderr=-1
    )


_WITH_ERRORS_APART = f"""\
import os
os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
{_MAIN}"""


class Copy:
    """A command in a copy of a process that has imported everything, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder, self.script = folder, script
        self.poll, self.send_signal, self.kill = script.poll, script.send_signal, script.kill

    @property
    def returncode(self) -> int | None:
        return self.script.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it wrote to its output and to its errors, after its end."""
        self.script.wait(timeout)
        return (self.folder / "stdout.txt").read_text(), (self.folder / "stderr.txt").read_text()


@contextmanager
def start_copy(server: Server, folder: Path, *arguments: str) -> Iterator[Copy]:
    """As ``start``, but without seconds of imports."""
    (folder / "main_of_copy.py").write_text(_WITH_ERRORS_APART)
    (folder / "stdout.txt").write_text("")
    script = server.start(
        folder / "main_of_copy.py", {"OMP_NUM_THREADS": "1"}, folder, folder / "stdout.txt", arguments
    )
    try:
        yield Copy(folder, script)
    finally:
        script.kill()


def results(folder):
    """results.json without times, which differ from run to run, and without what says how it was started."""
    found = json.loads((folder / "results.json").read_text())
    found["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in found["rows"]]
    return found
