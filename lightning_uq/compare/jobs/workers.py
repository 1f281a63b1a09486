"""Processes that share out jobs. They tell of their progress, and none of them outlives its parent."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from lightning_uq.compare.planning.plan import Job
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.errors import UQError, without_period

_Shared = TypeVar("_Shared")
_Result = TypeVar("_Result")
Work = Callable[[_Shared, Job, "int | list[int]", Progress], _Result]

PATIENCE = 10.0
"""Seconds for a process to tidy up before it is killed."""


def run_in_processes(
    jobs: deque[Job],
    work: Work[_Shared, _Result],
    shared: _Shared,
    devices: Sequence[int | list[int]],
    progress: Progress,
) -> Iterator[tuple[Job, _Result]]:
    """Run ``work(shared, job, devices, progress)`` for each job in one of several processes, and yield results as they come.

    Whatever ends the loop (an error in a job, an interrupt, the caller), all processes have ended after it.

    Args:
        jobs: The jobs; they are begun in this order, and removed when they are. Whoever iterates may add some.
        work: A function at the top level of a module.
        shared: What all jobs share; it is pickled.
        devices: Lightning's devices, one entry per process; no more processes are started than there are jobs at a time.
        progress: Told what the processes tell.

    Raises:
        UQError: That of a job, or a process died.
    """
    context = multiprocessing.get_context("spawn")
    begun: dict[Connection, Job] = {}
    idle: list[Connection] = []
    processes: list[BaseProcess] = []

    def begin() -> None:
        while jobs and (idle or len(processes) < len(devices)):
            if not idle:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, work, shared, devices[len(processes)]))
                process.start()
                processes.append(process)
                there.close()
                idle.append(here)
            free = idle.pop()
            begun[free] = jobs.popleft()
            free.send(begun[free])

    try:
        begin()
        while begun:
            ready = wait(list(begun))
            for here in [one for one in begun if one in ready]:
                try:
                    kind, content = here.recv()
                except EOFError:
                    job = begun[here]
                    raise UQError(
                        f"The process that trained {job.trainee} with seed {job.seed} was killed. If memory was short, use fewer `jobs`."
                    ) from None
                if kind == "failed":
                    raise content
                if kind != "finished":
                    getattr(progress, kind)(*content)
                    continue
                job = begun.pop(here)
                idle.append(here)
                begin()
                yield job, content
                begin()
    finally:
        _end(processes)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


class _Telling(Progress):
    """Passes on to the parent what a training tells."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def warning(self, text: str) -> None:
        self.connection.send(("warning", (text,)))

    def training(self, method: str, seed: int) -> None:
        self.connection.send(("training", (method, seed)))

    def epoch(self, method: str, seed: int) -> None:
        self.connection.send(("epoch", (method, seed)))


def _serve(connection: Connection, work: Work[Any, Any], shared: Any, devices: int | list[int]) -> None:
    """A process: work on one job after another, until it is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the parent as well, which stops this process
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = _Telling(connection)
    while True:
        job = connection.recv()
        try:
            message = "finished", work(shared, job, devices, progress)
        except Exception as error:
            message = "failed", _portable(error)
        connection.send(message)


def _stop(*_: Any) -> None:
    raise SystemExit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed, and nobody waits for the results


def _portable(error: Exception) -> Exception:
    """The error itself where it can be sent to another process, else one with its text."""
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # an error of anybody's class may refuse in any way
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {without_period(error)}.")
