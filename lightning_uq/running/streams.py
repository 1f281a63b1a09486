"""Independent random streams, and the random state of the process as plain data."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStream:
    """A member's own random numbers (torch, numpy, Python), which depend only on its seed and its own draws.

    Args:
        seed: Seed of the stream.

    Example:
        >>> stream = RandomStream(1)
        >>> with stream.active():
        ...     first = torch.rand(1)
        >>> _ = torch.rand(1)  # somebody else's draw
        >>> with stream.active():
        ...     second = torch.rand(1)
        >>> torch.equal(torch.cat([first, second]), torch.rand(2, generator=torch.Generator().manual_seed(1)))
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.state: dict[str, Any] | None = None

    @contextmanager
    def active(self, device: torch.device | None = None, *, advance: bool = True) -> Iterator[None]:
        """A context in which the global generators are this stream's; they are restored afterwards.

        Args:
            device: A CUDA device whose generator is included.
            advance: Whether the draws inside advance the stream; if not, they are forgotten.
        """
        outside = random_state(device)
        if self.state is None:
            _seed_all(self.seed, device)
        else:
            set_random_state(self.state, device)
            if device is not None and device.type == "cuda" and "cuda" not in self.state:
                torch.cuda.default_generators[_index(device)].manual_seed(self.seed)
        try:
            yield
        finally:
            if advance:
                self.state = {**(self.state or {}), **random_state(device)}
            set_random_state(outside, device)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, and of a CUDA device's."""
    numpy = np.random.get_state()  # noqa: NPY002  # what a member's own code may draw from
    state = {"torch": torch.get_rng_state(), "numpy": numpy, "python": random.getstate()}
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore the result of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def to_plain(state: dict[str, Any]) -> dict[str, Any]:
    """A random state as tensors, tuples and numbers, for ``torch.load(weights_only=True)``."""
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *(float(value) for value in rest))}


def from_plain(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`to_plain`."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    numpy = (kind, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    # Generators take their state from the CPU only, but a checkpoint may be loaded on a device.
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()} | {
        "numpy": numpy
    }


def _seed_all(seed: int, device: torch.device | None) -> None:
    # `torch.manual_seed` would also initialize CUDA, which must not happen before a fork.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
