"""What a call costs, in numbers that no clock has to measure: memory, products and operators."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


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


def products(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def operators(call: Callable[[], Any]) -> int:
    """Operators that a call runs, its backward pass included; about as many kernels are launched on a GPU. Views are free."""

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found += not func.is_view
            return func(*args, **(kwargs or {}))

    with Count() as mode:
        call()
    return mode.found


def cuda_calls(call: Callable[[], Any]) -> Counter[str]:
    """What a call asks of a CUDA device: ``launches`` of kernels, ``copies``, and ``waits`` until the device has done its work."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
    found: Counter[str] = Counter()
    for event in profiled.profiler.kineto_results.events():
        name = event.name()
        found["launches"] += name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
        found["copies"] += name.startswith("cudaMemcpy")
        found["waits"] += name in (
            "cudaStreamSynchronize",
            "cudaEventSynchronize",
        )  # the profiler calls cudaDeviceSynchronize
    return found
