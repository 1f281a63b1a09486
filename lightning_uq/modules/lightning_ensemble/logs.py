"""Logging of the members of an ensemble: each under its own prefix, and their mean under the original name."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.modules.lightning_ensemble.part import Part
from lightning_uq.networks.held_buffers import held_buffers

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MeanOfMetrics(Metric):
    """The mean of the members' metrics with one name. They are updated, synchronised and reset under their own names."""

    full_state_update = False

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self._members = tuple(metrics)  # a tuple, so that moving this metric to a device does not move them
        cached: list[Any] = [metric._forward_cache for metric in metrics]
        self._forward_cache: Any = None if any(value is None for value in cached) else torch.stack(cached).mean(0)

    @property
    def device(self) -> torch.device:
        """The members' device."""
        return self._members[0].device

    def update(self) -> None:
        """Do nothing: each member updates its own metric."""

    def compute(self) -> Tensor:
        """The mean of the members' values."""
        return torch.stack([metric.compute() for metric in self._members]).mean(0)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        return compute  # every member's `compute` synchronises and caches itself


class MemberLogs(Part):
    """Logs the members' values, through the ensemble's ``log``."""

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._muted = False
        self._logged: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
        self._counts: Counter[tuple[int, str]] = Counter()

    def log(self, i: int, name: str, value: Any, prog_bar: bool = False, *args: Any, **kwargs: Any) -> None:
        """Member i's ``self.log``: logs ``member_i/name``, and stores the value for the mean, which the progress bar shows."""
        if self._muted:
            return
        self.members.ensemble.log(f"member_{i}/{name}", value, False, *args, **kwargs)
        occurrence = self._counts[i, name]
        self._counts[i, name] += 1
        self._logged.setdefault((name, occurrence), []).append((value, prog_bar, args, kwargs))

    def log_means(self) -> None:
        """Log the mean over members of each value logged since the last call, in the same hook, as Lightning requires."""
        logged, self._logged = self._logged, {}
        self._counts.clear()
        ensemble = self.members.ensemble
        for (name, _), entries in logged.items():
            values = [value for value, *_ in entries]
            _, prog_bar, args, kwargs = entries[0]
            if isinstance(values[0], Metric):
                mean: Any = MeanOfMetrics(values)
                # The metric is not an attribute of the ensemble, so Lightning cannot find its name.
                kwargs = {"metric_attribute": name, **kwargs}
            else:
                mean = torch.stack([torch.as_tensor(v, device=ensemble.device).detach().squeeze() for v in values])
                mean = (mean if mean.is_floating_point() else mean.float()).mean()
            ensemble.log(name, mean, prog_bar, *args, **kwargs)

    @contextmanager
    def quiet(self, member: LightningModule) -> Iterator[None]:
        """Suppress a member's logging, and updates of its metrics and buffers."""
        places = [
            (m._modules, name, c) for m in member.modules() for name, c in m._modules.items() if isinstance(c, Metric)
        ]
        try:
            self._muted = True
            for children, name, metric in places:
                children[name] = metric.clone()
            with held_buffers(member):
                yield
        finally:
            self._muted = False
            for children, name, metric in places:
                children[name] = metric
