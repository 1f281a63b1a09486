"""Memory that a call takes, counted by torch rather than read off a process that others share."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors that were alive at once during ``call``, beyond those alive before; temporary ones inside operators count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()  # every allocation, and every release as a negative size
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = 0
    for _, size in changes:
        alive += size
        peak = max(peak, alive)
    return peak
