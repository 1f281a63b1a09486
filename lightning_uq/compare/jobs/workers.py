"""Worker processes for jobs. They report their progress, and none of them outlives its parent."""

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
"""Seconds for a process to clean up before it is killed."""


def run_in_processes(
    jobs: deque[Job],
    work: Work[_Shared, _Result],
    shared: _Shared,
    devices: Sequence[int | list[int]],
    progress: Progress,
) -> Iterator[tuple[Job, _Result]]:
    """Run ``work(shared, job, devices, progress)`` for each job in one of several processes, and yield results in the order of completion.

    However the loop ends (by an error in a job, an interrupt, or the caller), all processes have ended afterwards.

    Args:
        jobs: The jobs, started in this order and removed when started. The caller may add some while iterating.
        work: A function at the top level of a module.
        shared: The shared inputs of all jobs, which are pickled.
        devices: Lightning's devices, one entry per process. There are never more processes than jobs.
        progress: Gets the progress of all processes.

    Raises:
        UQError: The error of a job, or a process died.
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


class _ProgressSender(Progress):
    """Sends the progress of a training to the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def warning(self, text: str) -> None:
        self.connection.send(("warning", (text,)))

    def training(self, method: str, seed: int) -> None:
        self.connection.send(("training", (method, seed)))

    def epoch(self, method: str, seed: int) -> None:
        self.connection.send(("epoch", (method, seed)))


def _serve(connection: Connection, work: Work[Any, Any], shared: Any, devices: int | list[int]) -> None:
    """The loop of a process: work on one job after another, until it is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C also reaches the parent, which stops this process
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = _ProgressSender(connection)
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
    os._exit(1)  # the parent was killed, so no one waits for the results


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent to another process, else an error with its text."""
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # pickling an error of any class may fail in any way
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {without_period(error)}.")
