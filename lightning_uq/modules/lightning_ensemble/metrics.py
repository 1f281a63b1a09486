"""The metrics of an ensemble of LightningModules as a whole, in addition to its members' logged values."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_uq.errors import NotFiniteError, NotFittedError, UQError
from lightning_uq.guessing import report_guess
from lightning_uq.modules.lightning_ensemble.checks import input_problem, layout_problem, unscorable_reason
from lightning_uq.modules.lightning_ensemble.part import Part
from lightning_uq.running.evaluation import evaluating
from lightning_uq.running.ranks import first_of_ranks
from lightning_uq.tasks import describe

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class EnsembleMetrics(Part):
    """The metrics under ``ensemble/val_*`` and ``ensemble/test_*``, which are skipped if the data or outputs do not fit.

    Members that train alone need not fit the ensemble's task, so failures here do not stop the run, and are reported once: as a warning, from
    the first batch on, if the ensemble cannot predict such batches either. The exceptions are non-finite inputs or outputs: outside a
    training they are an error.

    One batch that does not fit skips all metrics of its loader, because metrics of part of the data would look like those of all.

    Another rank may have no such batch, or no batch at all. The ranks therefore decide together at the end of an evaluation, and log
    the metrics only then, so no rank waits for a value that another does not compute. With several loaders, Lightning gives each
    loader only the values logged in its steps. On one process, the metrics of several loaders are therefore logged in the steps, and
    are NaN after a batch that does not fit. On several processes, each loader's results contain the values of all loaders.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._reasons: dict[int, str | None] = {}  # by loader, for loaders of which this rank has seen a batch
        self._metric_sets = nn.ModuleList()
        self._is_validation = True
        self._notified = False  # whether the lack of metrics was reported

    @property
    def are_logged_at_end(self) -> bool:
        """Whether the metrics of this evaluation are logged at its end instead of in its steps."""
        return self.members.ensemble.trainer.world_size > 1 or len(self._metric_sets) == 1

    def start(self, stage: str, metric_sets: nn.ModuleList) -> None:
        """Start an evaluation with one set of metrics per loader."""
        self._is_validation = stage == "val"
        self._reasons, self._metric_sets = {}, metric_sets

    def update(self, batch: Any, dataloader_idx: int, evaluate: Callable[[], None]) -> None:
        """Let ``evaluate`` update a loader's metrics, unless one of its batches does not fit."""
        ensemble, unreadable = self.members.ensemble, None
        is_left_out = self._reasons.get(dataloader_idx) is not None
        if is_left_out and (ensemble.inferred_task is None or ensemble.inferred_task.is_open):
            return
        try:
            reason = unreadable = input_problem(ensemble, batch)
            if reason is None:
                reason = layout_problem(ensemble, batch)
            if reason is None:
                x, y = ensemble.unpack_batch(batch)
                self._look_at_task(x, y)
                reason = unscorable_reason(ensemble, y)  # type: ignore[arg-type]  # y is not None if the layout is known
            if reason is None and not is_left_out:
                evaluate()
        except Exception as error:  # a member's forward and the user's functions can raise any exception
            is_error = isinstance(error, NotFiniteError | NotFittedError)
            if is_error and ensemble.trainer.state.fn != TrainerFn.FITTING:
                raise
            reason = _failure_text(error)
            if not isinstance(error, UQError):  # of a member's forward
                unreadable = f"{reason.rstrip('.')}. Pass `unpack_batch` or `predict_fn`"
        if unreadable is not None:
            self._warn_of_predictions(unreadable)
        if is_left_out:
            return
        if reason is not None:
            for metric in self._metrics(dataloader_idx).values():
                metric.reset()
        self._reasons[dataloader_idx] = reason

    def log(self, stage: str) -> None:
        """Log the metrics of every loader whose batches fit on all ranks. Call it on all ranks."""
        ensemble = self.members.ensemble
        loaders = range(len(self._metric_sets))
        reasons = [self._reasons.get(i) for i in loaders]
        self.agree_on_task()
        doubt = None if ensemble.inferred_task is None else ensemble.inferred_task.contradiction
        reasons = first_of_ranks([self._reasons.get(i) or doubt for i in loaders], ensemble.trainer)
        any_seen = first_of_ranks([True if i in self._reasons else None for i in loaders], ensemble.trainer)
        reason = next(filter(None, reasons), None)
        if reason is not None and not self._notified:
            inferred = ensemble.inferred_task
            default = f" Predictions are read with `task={describe(ensemble.task)}`; pass `task` if that is wrong."
            is_default = inferred is not None and inferred.name is None
            rank_zero_info(
                f"The ensemble as a whole has no metrics: {reason.rstrip('.')}.{default if is_default else ''}"
            )
            self._notified = True
        for i in loaders if self.are_logged_at_end else ():
            if any_seen[i] and reasons[i] is None:
                # At the end of an epoch, Lightning does not append loader numbers to the names.
                loader = f"/dataloader_idx_{i}" if len(loaders) > 1 else ""
                for key, metric in self._metrics(i).items():
                    name = f"ensemble/{stage}_{key}{loader}"
                    # A metric counts its samples itself, so the batch size is 1.
                    ensemble.log(name, metric, batch_size=1, metric_attribute=name, add_dataloader_idx=False)

    def look_at_training(self, batch: Any, batch_idx: int) -> None:
        """Warn if the first batch cannot be read. If no task was given, look for it there, and for contradictions in all batches."""
        ensemble = self.members.ensemble
        if batch_idx == 0 and not self._notified:
            unreadable = input_problem(ensemble, batch)
            if unreadable is not None:
                self._warn_of_predictions(unreadable)
        if ensemble.inferred_task is None:
            return
        try:
            if layout_problem(ensemble, batch) is not None:
                return
            x, y = ensemble.unpack_batch(batch)
            if batch_idx == 0 and ensemble.inferred_task.is_open:
                with evaluating(ensemble, ensemble.trainer):
                    self._look_at_task(x, y, is_training=True)
            elif y is not None:
                ensemble.inferred_task.note(y)
        except Exception as error:  # as in `update`
            report_guess(
                f"A training batch does not show the task of the ensemble as a whole: {_failure_text(error)}", ensemble
            )

    def _warn_of_predictions(self, reason: str) -> None:
        """Warn once that the ensemble as a whole cannot predict batches like one that it got."""
        if not self._notified:
            rank_zero_warn(
                "The members train by their own steps, but the ensemble as a whole has no metrics, and its predictions of such batches will fail: "
                f"{reason.rstrip('.')}. Without this argument, only the members can be used. It may also be passed to `load_from_checkpoint`."
            )
            self._notified = True

    def agree_on_task(self) -> None:
        """Take the task, and any doubt about it, from the batches of all ranks. Call it on all ranks."""
        ensemble = self.members.ensemble
        if ensemble.inferred_task is not None and ensemble.inferred_task.agree(
            self.members.modules[0], ensemble.trainer
        ):
            self._follow_task()

    def _look_at_task(self, x: Any, y: Any, *, is_training: bool = False) -> None:
        if self.members.ensemble.look_at_task(x, y, is_training=is_training):
            self._follow_task()

    def _follow_task(self) -> None:
        """Take over an inferred task, with its metrics."""
        self.members.ensemble.follow_inferred_task()
        for metrics in self._metric_sets:
            kept = metrics["loss"]  # type: ignore[index]  # a ModuleList yields bare Modules
            metrics.clear()  # type: ignore[operator]
            fresh = {"loss": kept, **self.members.ensemble.task.metrics("val" if self._is_validation else "test")}
            metrics.update({name: metric.to(kept.device) for name, metric in fresh.items()})  # type: ignore[operator]

    def _metrics(self, dataloader_idx: int) -> dict[str, Metric]:
        return dict(self._metric_sets[dataloader_idx].items())  # type: ignore[operator]  # a ModuleList yields bare Modules


def _failure_text(error: Exception) -> str:
    """An error's text as the reason for skipping metrics."""
    return str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"
