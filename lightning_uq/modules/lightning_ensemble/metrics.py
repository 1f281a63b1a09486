"""The metrics of an ensemble of LightningModules as a whole, beside what its members log."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_uq.modules.lightning_ensemble.checks import misfit_of
from lightning_uq.modules.lightning_ensemble.part import Part
from lightning_uq.tasks import OutputShapeError

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class EnsembleMetrics(Part):
    """The metrics under ``ensemble/val_*`` and ``ensemble/test_*``, which are left out where the data or outputs do not fit.

    Members that train alone need not fit the ensemble's task, so a misfit stops nothing: it is told once. Metrics of a part of
    the data would pass for those of all of it, so one batch that does not fit leaves out the metrics of its loader. Another
    rank may not have seen that batch, or may have had no batch at all. So the ranks decide together when an evaluation ends,
    and only then log the metrics: no rank waits for a value that another one does not compute.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._misfits: dict[int, str | None] = {}  # by loader, of which this rank has seen a batch
        self._is_told = False

    def start(self) -> None:
        """Begin an evaluation."""
        self._misfits = {}

    def update(self, batch: Any, dataloader_idx: int, evaluate: Callable[[], None]) -> None:
        """Let ``evaluate`` update the metrics of a loader, unless a batch of it does not fit."""
        if self._misfits.get(dataloader_idx) is not None:
            return
        ensemble = self.members.ensemble
        misfit = misfit_of(self.members.modules[0], batch, ensemble.unpack_batch, ensemble.task)
        if misfit is None:
            try:
                evaluate()
            except OutputShapeError as error:
                misfit = str(error)
        self._misfits[dataloader_idx] = misfit

    def log(self, stage: str, metric_sets: nn.ModuleList) -> None:
        """Log the metrics of every loader whose batches fit on all ranks; to be called on all ranks."""
        ensemble = self.members.ensemble
        strategy, rank, world = ensemble.trainer.strategy, ensemble.trainer.global_rank, ensemble.trainer.world_size
        misfits = [self._misfits.get(i) for i in range(len(metric_sets))]
        seen = [int(i in self._misfits) for i in range(len(metric_sets))]
        own = [[0 if misfit is None else world - rank for misfit in misfits], seen]
        found = torch.as_tensor(strategy.reduce(torch.tensor(own, device=ensemble.device), reduce_op="max"))
        first_misfit, any_seen = found.tolist()
        if any(first_misfit) and not self._is_told:
            reason = next((misfit for misfit in misfits if misfit is not None), "")
            reason = strategy.broadcast(reason, src=world - max(first_misfit))
            rank_zero_info(f"The ensemble as a whole has no metrics: {reason.rstrip('.')}.")
            self._is_told = True
        for i, metrics in enumerate(metric_sets):
            if any_seen[i] and not first_misfit[i]:
                # At an epoch's end Lightning adds no loader to the names.
                loader = f"/dataloader_idx_{i}" if len(metric_sets) > 1 else ""
                for name, metric in metrics.items():  # type: ignore[operator]  # a ModuleList yields bare Modules
                    name = f"ensemble/{stage}_{name}{loader}"
                    ensemble.log(name, metric, batch_size=1, metric_attribute=name, add_dataloader_idx=False)
