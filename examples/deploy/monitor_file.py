"""A drift monitor that threads share, that survives a restart of its process, and that Prometheus reads."""

import fcntl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client.core import GaugeMetricFamily, Metric

from lightning_uq import DriftMonitor


class MonitorFile:
    """A :class:`DriftMonitor` behind a lock, with its state in a file ``NAME.json`` that one process at a time may hold.

    An existing state is resumed. Otherwise the monitor begins as ``monitor.json`` of the same folder, which all processes share.

    Args:
        folder: Where ``monitor.json`` is, and where the state will be.
        name: Name of the state.
        seed: Seed of the monitor, another one for each name.
        save_every: The state is saved each time it has this number of further rows, and at the end of the context.

    Raises:
        RuntimeError: Another process holds the state, or the state belongs to another alarm than ``monitor.json``.
    """

    def __init__(self, folder: Path, name: str, *, seed: int, save_every: int = 100) -> None:
        self.path, self.save_every = folder / f"{name}.json", save_every
        self._lock = threading.Lock()
        self._claim = self.path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            self.monitor = self._begin(DriftMonitor.from_json((folder / "monitor.json").read_text()), seed)
        except BaseException as error:
            self._claim.close()
            if isinstance(error, BlockingIOError):
                raise RuntimeError(f"Another process holds {self.path}. Start each one with its own number.") from error
            raise
        self._saved = self.monitor.num_rows

    def _begin(self, first: DriftMonitor, seed: int) -> DriftMonitor:
        if not self.path.exists():
            first.seed = seed
            first.reset()  # an identity of its own, by which a merge recognises it
            return first
        resumed = DriftMonitor.from_json(self.path.read_text())
        if not torch.equal(resumed.bins.edges, first.bins.edges):
            raise RuntimeError(f"{self.path} belongs to another alarm than monitor.json. Move the old states away.")
        return resumed

    def update(self, scores: np.ndarray) -> None:
        """Add the scores [B] of one request."""
        with self._lock:
            self.monitor.update(torch.from_numpy(scores))
            if self.monitor.num_rows - self._saved >= self.save_every:
                self._save()

    def merge(self, paths: list[Path]) -> None:
        """Add the rows that other states have gained since the last merge."""
        with self._lock:
            for path in paths:
                self.monitor.merge(DriftMonitor.from_json(path.read_text()))
            self._save()

    def collect(self) -> Iterator[Metric]:
        """What a registry of Prometheus asks for."""
        monitor = self.monitor
        yield GaugeMetricFamily(
            "drift_log10_evidence", "Evidence for a drift now, 0 at the start", monitor.log10_evidence
        )
        yield GaugeMetricFamily("drifted", "1 once a drift was found", float(monitor.drifted))
        yield GaugeMetricFamily("drift_rows", "Rows that the monitor has seen, over restarts", monitor.num_rows)

    def _save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(self.monitor.to_json())
        partial.replace(self.path)  # whole or not at all
        self._saved = self.monitor.num_rows

    def __enter__(self) -> "MonitorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._save()
        self._claim.close()
