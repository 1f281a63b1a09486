"""The metrics of an ensemble of LightningModules as a whole, beside what its members log."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import Metric

from lightning_uq.errors import NotFiniteError, NotFittedError, UQError
from lightning_uq.modules.lightning_ensemble.checks import layout_problem, unscorable_reason
from lightning_uq.modules.lightning_ensemble.part import Part
from lightning_uq.running.inferred_task import INFERABLE
from lightning_uq.tasks import describe

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class EnsembleMetrics(Part):
    """The metrics under ``ensemble/val_*`` and ``ensemble/test_*``, which are left out where the data or outputs do not fit.

    Members that train alone need not fit the ensemble's task, so whatever fails here stops nothing, and is reported once. An input or an
    output that is not finite is the exception: outside a training it is an error.

    Metrics of a part of the data would pass for those of all of it, so one such batch leaves out the metrics of its loader.

    Another rank may not have seen that batch, or may have had no batch at all. So the ranks decide together when an evaluation
    ends, and only then log the metrics: no rank waits for a value that another one does not compute. Lightning gives each of
    several loaders only the values that were logged in its steps. On one process, the metrics of several loaders are therefore
    logged in the steps, and are NaN after a batch that does not fit; on several, each loader's results hold those of all.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._reasons: dict[int, str | None] = {}  # by loader, of which this rank has seen a batch
        self._metric_sets = nn.ModuleList()
        self._is_validation = True
        self._notified = False

    @property
    def are_logged_at_end(self) -> bool:
        """Whether the metrics of this evaluation are logged when it ends, instead of in its steps."""
        return self.members.ensemble.trainer.world_size > 1 or len(self._metric_sets) == 1

    def start(self, stage: str, metric_sets: nn.ModuleList) -> None:
        """Begin an evaluation with one set of metrics per loader."""
        self._is_validation = stage == "val"
        self._reasons, self._metric_sets = {}, metric_sets

    def update(self, batch: Any, dataloader_idx: int, evaluate: Callable[[], None]) -> None:
        """Let ``evaluate`` update the metrics of a loader, unless a batch of it does not fit."""
        if self._reasons.get(dataloader_idx) is not None:
            return
        ensemble = self.members.ensemble
        try:
            reason = unscorable_reason(ensemble, batch)
            if reason is not None and self._infer_task(batch):
                reason = None
            if reason is None:
                evaluate()
        except Exception as error:  # a member's forward and the user's own functions may raise anything
            is_error = isinstance(error, NotFiniteError | NotFittedError)
            if is_error and ensemble.trainer.state.fn != TrainerFn.FITTING:
                raise
            reason = _described(error)
        if reason is not None:
            for metric in self._metrics(dataloader_idx).values():
                metric.reset()
        self._reasons[dataloader_idx] = reason

    def log(self, stage: str) -> None:
        """Log the metrics of every loader whose batches fit on all ranks; to be called on all ranks."""
        ensemble = self.members.ensemble
        strategy, rank, world = ensemble.trainer.strategy, ensemble.trainer.global_rank, ensemble.trainer.world_size
        loaders = range(len(self._metric_sets))
        reasons = [self._reasons.get(i) for i in loaders]
        own = [
            [0 if reason is None else world - rank for reason in reasons],
            [int(i in self._reasons) for i in loaders],
            [_code(ensemble.inferred_task)] * len(loaders),
        ]
        found = torch.as_tensor(strategy.reduce(torch.tensor(own, device=ensemble.device), reduce_op="max"))
        first_reason, any_seen, inferred = found.tolist()
        if any(inferred) and ensemble.inferred_task is None:  # a rank without a batch
            self._take_task(list(INFERABLE)[max(inferred) - 1])
        if any(first_reason) and not self._notified:
            reason = next((reason for reason in reasons if reason is not None), "")
            reason = strategy.broadcast(reason, src=world - max(first_reason))
            default = f" Predictions are read with `task={describe(ensemble.task)}`; pass `task` if they are not."
            rank_zero_info(
                f"The ensemble as a whole has no metrics: {reason.rstrip('.')}.{default if ensemble.infers_task else ''}"
            )
            self._notified = True
        for i in loaders if self.are_logged_at_end else ():
            if any_seen[i] and not first_reason[i]:
                # At an epoch's end Lightning adds no loader to the names.
                loader = f"/dataloader_idx_{i}" if len(loaders) > 1 else ""
                for key, metric in self._metrics(i).items():
                    name = f"ensemble/{stage}_{key}{loader}"
                    # A metric counts for itself, so the size of the batch is 1.
                    ensemble.log(name, metric, batch_size=1, metric_attribute=name, add_dataloader_idx=False)

    def look_for_task(self, batch: Any) -> None:
        """Take the task that the first training batch shows, or its doubt, if the task was left to its default."""
        try:
            self._infer_task(batch, is_training=True)
        except Exception as error:  # as in `update`
            rank_zero_info(f"The first batch does not show the task of the ensemble as a whole: {_described(error)}")

    def _infer_task(self, batch: Any, *, is_training: bool = False) -> bool:
        """Take the task that a batch shows, if it was left to its default."""
        ensemble = self.members.ensemble
        if layout_problem(ensemble, batch) is not None:
            return False
        if not ensemble.infer_task(*ensemble.unpack_batch(batch), is_training=is_training):
            return False
        assert ensemble.inferred_task is not None
        self._take_task(ensemble.inferred_task)
        return True

    def _take_task(self, name: str) -> None:
        """Take an inferred task, with its metrics."""
        self.members.ensemble.set_inferred_task(name)
        for metrics in self._metric_sets:
            kept = metrics["loss"]  # type: ignore[index]  # a ModuleList yields bare Modules
            metrics.clear()  # type: ignore[operator]
            fresh = {"loss": kept, **self.members.ensemble.task.metrics("val" if self._is_validation else "test")}
            metrics.update({name: metric.to(kept.device) for name, metric in fresh.items()})  # type: ignore[operator]

    def _metrics(self, dataloader_idx: int) -> dict[str, Metric]:
        return dict(self._metric_sets[dataloader_idx].items())  # type: ignore[operator]  # a ModuleList yields bare Modules


def _described(error: Exception) -> str:
    """An error as the reason why something is left out."""
    return str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"


def _code(name: str | None) -> int:
    """A task's name as a number that ranks can reduce; 0 for none."""
    return 0 if name is None else 1 + list(INFERABLE).index(name)
