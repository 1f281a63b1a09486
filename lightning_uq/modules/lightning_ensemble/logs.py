"""What the members of an ensemble log: each under its own prefix, and their mean under the name that they used."""

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
    """The mean of the members' metrics of one name; they are updated, synchronised and reset under their own names."""

    full_state_update = False

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self._members = tuple(metrics)  # in a tuple, so that moving this metric leaves them where they are
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
        return compute  # every member's compute synchronises and caches by itself


class MemberLogs(Part):
    """Logs for the members, through the ensemble's ``log``."""

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._muted = False
        self._logged: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
        self._counts: Counter[tuple[int, str]] = Counter()

    def log(self, i: int, name: str, value: Any, prog_bar: bool = False, *args: Any, **kwargs: Any) -> None:
        """Member i's ``self.log``: under ``member_i/name``, and remembered for the mean, which the progress bar shows."""
        if self._muted:
            return
        self.members.ensemble.log(f"member_{i}/{name}", value, False, *args, **kwargs)
        occurrence = self._counts[i, name]
        self._counts[i, name] += 1
        self._logged.setdefault((name, occurrence), []).append((value, prog_bar, args, kwargs))

    def log_means(self) -> None:
        """Log the mean over members of each value logged since the last call; Lightning requires the same hook."""
        logged, self._logged = self._logged, {}
        self._counts.clear()
        ensemble = self.members.ensemble
        for (name, _), entries in logged.items():
            values = [value for value, *_ in entries]
            _, prog_bar, args, kwargs = entries[0]
            if isinstance(values[0], Metric):
                mean: Any = MeanOfMetrics(values)
                # It is no attribute of the ensemble, so Lightning cannot look its name up.
                kwargs = {"metric_attribute": name, **kwargs}
            else:
                mean = torch.stack([torch.as_tensor(v, device=ensemble.device).detach().squeeze() for v in values])
                mean = (mean if mean.is_floating_point() else mean.float()).mean()
            ensemble.log(name, mean, prog_bar, *args, **kwargs)

    @contextmanager
    def quiet(self, member: LightningModule) -> Iterator[None]:
        """Inside, a member logs nothing, and its metrics and buffers record nothing."""
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
