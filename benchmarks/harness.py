"""Times implementations of the same work in turn, after checking that their results agree, and keeps what was found as plain data."""

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.counting import peak_bytes

SHORTEST = 0.05
"""Seconds that a measurement takes at least: a shorter call is repeated within it."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: Its name on the page.
        prepare: Makes the call that is measured; what it does itself is not measured. It imports the peer.
        package: The distribution of the peer, whose version is shown. The contender is left out if it cannot be imported.
        agrees: Whether its result must equal that of the first contender; a bare reference computes less.
    """

    name: str
    prepare: Callable[[], Call]
    package: str | None = None
    agrees: bool = True


@dataclass(frozen=True)
class Work:
    """Some work, and its implementations, ours first.

    Attributes:
        name: Its name on the page.
        contenders: The implementations.
        rtol: Relative tolerance of the results.
        atol: Absolute tolerance of the results.
        calls: Calls per measurement; None: as many as take :data:`SHORTEST`. 1 for a call that changes its own state.
        has_peak: Whether the peak of memory is measured on a CPU, too. The profiler keeps every operator of the call: 15 GB for a long training.
    """

    name: str
    contenders: Sequence[Contender]
    rtol: float = 1e-4
    atol: float = 1e-5
    calls: int | None = None
    has_peak: bool = True


class Clock(Protocol):
    """Seconds from any origin."""

    def __call__(self) -> float: ...


def clock_for(device: str, threads: int) -> Clock:
    """Processor time where one thread does all the work, since other processes do not count in it; else the time that passes."""
    if device != "cpu":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized
    return time.process_time if threads == 1 else time.perf_counter


def measure(work: Work, *, repeats: int, clock: Clock, device: str = "cpu") -> dict[str, Any]:
    """Check that the contenders agree, time them in turn, and return times in ms, peaks in MB, and who was left out.

    Raises:
        AssertionError: A result differs from that of the first contender.
    """
    first: dict[str, tuple[float, Any]] = {}
    left_out: dict[str, str] = {}
    for one in work.contenders:
        try:
            call = one.prepare()
        except ImportError as error:
            if one.package is None:
                raise
            left_out[one.package] = str(error).partition("\n")[0]
            continue
        call() if work.calls is None else None  # the first call of some kernels is slow
        start = clock()
        result = call()
        first[one.name] = clock() - start, result
    present = [one for one in work.contenders if one.name in first]
    check(work, {one.name: first[one.name][1] for one in present if one.agrees})
    calls = {name: work.calls or max(1, int(SHORTEST / max(seconds, 1e-6)) + 1) for name, (seconds, _) in first.items()}
    first.clear()
    peaks = {one.name: peak(one.prepare(), device) / 2**20 for one in present if work.has_peak or device != "cpu"}
    times = interleaved({one.name: one.prepare for one in present}, calls, repeats, clock)
    return {
        "work": work.name,
        "ms": {name: [1e3 * seconds for seconds in each] for name, each in times.items()},
        "peak_mb": peaks,
        "versions": {one.name: f"{one.package} {version_of(one.package)}" for one in present if one.package},
        "left_out": left_out,
        "checked": [one.name for one in present if one.agrees],
    }


def check(work: Work, results: dict[str, Any]) -> None:
    """Raise an AssertionError that names the work and the contender whose result differs from the first one's."""
    (name, expected), *others = results.items()
    for other, found in others:
        torch.testing.assert_close(
            _on_cpu(found),
            _on_cpu(expected),
            rtol=work.rtol,
            atol=work.atol,
            check_dtype=False,
            msg=lambda text, other=other: f"{work.name}: the results of {other} and {name} differ.\n{text}",
        )


def _on_cpu(result: Any) -> Tensor:
    return torch.as_tensor(result).detach().cpu()


def interleaved(
    prepares: dict[str, Callable[[], Call]], calls: dict[str, int], repeats: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds per call of each measurement: every round measures each contender once, so that a slow moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in prepares}
    gc.freeze()  # or each collection below looks through all imported packages, for a quarter of a second
    for _ in range(repeats):
        for name, prepare in prepares.items():
            call = prepare()
            gc.collect()
            start = clock()
            for _ in range(calls[name]):
                call()
            times[name].append((clock() - start) / calls[name])
    gc.unfreeze()
    return times


def peak(call: Call, device: str) -> int:
    """The most bytes of tensors that were alive at once during the call, beyond those alive before."""
    if device == "cpu":
        return peak_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def version_of(package: str) -> str:
    """The version of an installed distribution."""
    return importlib.metadata.version(package)


def circumstances(device: str, threads: int, repeats: int) -> dict[str, Any]:
    """Where and when a measurement was made."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{processor()}, {os.cpu_count()} cores",
        "threads": threads,
        "repeats": repeats,
        "clock": "processor time" if device == "cpu" and threads == 1 else "elapsed time",
        "load": round(load, 1),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "lightning")},
    }


def processor() -> str:
    """The model of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
