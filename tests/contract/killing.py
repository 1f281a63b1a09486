"""A process that dies while it writes a file."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import torch

# Its children are copies of a process that has imported everything and run nothing: in a copy of a process whose threads have run,
# OpenMP waits for ever, and torch refuses to differentiate.
PRELOADED = multiprocessing.get_context("forkserver")
PRELOADED.set_forkserver_preload(["tests.contract.cases"])


def dies(work: Callable[..., Any], *args: Any) -> bool:
    """Whether a signal kills the process that runs ``work(*args)``, a function of a module; what it left on the disk stays."""
    child = PRELOADED.Process(target=_run, args=(work, *args))
    child.start()
    child.join()
    if child.exitcode > 0:
        raise AssertionError("the work failed, see what it wrote")
    return child.exitcode < 0


def _run(work: Callable[..., Any], *args: Any) -> None:
    torch.manual_seed(0)
    work(*args)


def files_end_at(num_bytes: int) -> None:
    """From now on the system kills this process at byte ``num_bytes`` of any file, without a word."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def die() -> None:
    """As ``kill -9`` does it."""
    os.kill(os.getpid(), signal.SIGKILL)
