"""A process that dies while it writes a file."""

import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch


def dies(work: Callable[[], Any]) -> bool:
    """Whether a copy of this process is killed by a signal in ``work``; what it left on the disk stays."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks where there are threads: nothing here waits for them
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # threads are not copied, and OpenMP would wait for them
            work()
        except BaseException:
            traceback.print_exc()  # or the parent would know only that nobody was killed
            sys.stderr.flush()
        finally:
            os._exit(0)  # neither pytest's nor anybody's cleaning up is this process' business
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def files_end_at(num_bytes: int) -> None:
    """From now on the system kills this process at byte ``num_bytes`` of any file, without a word."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def die() -> None:
    """As ``kill -9`` does it."""
    os.kill(os.getpid(), signal.SIGKILL)
