"""Scripts that run in copies of a process which has imported everything: two ranks take longer to import it than to run.

`python -m tests.preloaded SOCKET` is that process. It forks a copy for every script, and runs nothing else, so a copy is as a new
process is after its imports. The second rank that Lightning starts is a copy too.
"""

import atexit
import gc
import os
import pickle
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ADDRESS = "LIGHTNING_UQ_TESTS_PRELOADED"


class Script:
    """A script that runs, with the part of ``subprocess.Popen`` that Lightning and the tests use.

    Args:
        command: ``[python, script, arguments ...]``.
        env: Its environment, which names the server.
        cwd: Its working directory.
        output: A file that its output and errors are appended to.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, output: str) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(env[_ADDRESS])
        self._file = self._socket.makefile("rwb")
        pickle.dump((self.args[1:], dict(env), cwd or str(Path.cwd()), output), self._file)
        self._file.flush()
        self.pid: int = pickle.load(self._file)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return int(self.returncode or 0)

    def send_signal(self, number: int) -> None:
        """Send a signal to a script that still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._socket], [], [], timeout)[0]:
            self.returncode = pickle.load(self._file)
            self._file.close()
            self._socket.close()
        return self.returncode


class Server:
    """The process with everything imported; it ends when this one does.

    Args:
        folder: Where its socket lies.
        root: The directory of the package and its tests.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.address = str(folder / "preloaded")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.preloaded", self.address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=root
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the server did not start, see what it wrote"

    def run(
        self, script: Path, env: Mapping[str, str], cwd: Path, timeout: float, arguments: Sequence[str] = ()
    ) -> tuple[int, str]:
        """The exit status of a script, and what it wrote."""
        output = cwd / f"{script.stem}.output"
        running = self.start(script, env, cwd, output, arguments)
        try:
            return running.wait(timeout), output.read_text()
        finally:
            running.kill()

    def start(
        self, script: Path, env: Mapping[str, str], cwd: Path, output: Path, arguments: Sequence[str] = ()
    ) -> Script:
        """Start a script that writes to a file."""
        command, environment = [sys.executable, str(script), *arguments], {**os.environ, **env, _ADDRESS: self.address}
        return Script(command, environment, str(cwd), str(output))

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=10)


def _serve(address: str) -> None:
    import tests.contract.cases
    import tests.quick_lightning  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a script
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in (found := select.select([listener, sys.stdin], [], [])[0]):
        assert found
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _supervise(connection)
        connection.close()


def _supervise(connection: socket.socket) -> None:
    """Start the script that was asked for, and tell its process and its exit status. It does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection, connection.makefile("rwb") as file:
        request = pickle.load(file)
        pid = os.fork()
        if pid == 0:
            _run(*request)
        try:
            pickle.dump(pid, file)
            file.flush()
            pickle.dump(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file)
            file.flush()
        except BrokenPipeError:  # nobody asks any more
            os._exit(1)
    os._exit(0)


def _run(argv: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    """Run the script in this process, as a new process would. It does not return."""
    status: Any = 0
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        random.seed()
        import numpy as np
        from lightning.pytorch.strategies.launchers import subprocess_script

        np.random.seed()  # noqa: NPY002  # the legacy generator is what a script may use unseeded
        subprocess_script.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
            Popen=lambda command, env, cwd: Script(command, env, cwd, output)
        )
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    _serve(sys.argv[1])
