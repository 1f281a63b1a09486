"""The metrics of test predictions that a callback logs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq import batches
from lightning_uq.batches import own_batch
from lightning_uq.errors import InputError
from lightning_uq.functional.waiting import is_free
from lightning_uq.predictions import Prediction
from lightning_uq.running.classes import labelled_batch
from lightning_uq.running.evaluation import evaluating
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.metrics import update_all
from lightning_uq.running.ranks import first_of_ranks, raise_on_all_ranks
from lightning_uq.tasks import Task

When = Literal["", "_calibrated"]
"""The kind of predictions that a metric scores, as the suffix of its name."""


Predict = Callable[[nn.Module, Any, Trainer, bool], tuple[Tensor, Mapping[When, Prediction]]]
"""``predict(model, batch, trainer, check)`` returns outputs [Z, B, ...] of a batch and the predictions to score."""


class LoggedMetrics:
    """Metrics of the test batches of each loader, on any number of ranks.

    The test belongs to the user, so a batch that cannot be scored, such as one without labels, is no error: its loader gets no metrics, and a
    message gives the reason. The ranks decide this together at the end of the test, so no rank waits for another.

    Args:
        reader: Reader of the model's batches.
        predict: Makes the predictions to score.
        metrics: ``metrics(task, when)`` returns the metrics of one kind of predictions by name.
        who: Name of the callback, for messages.
        whens: The kinds of predictions.
        per_sample: Whether metrics get whole maps rather than their positions.
        needs_targets: Whether metrics use targets. If not, they get whole predictions and zeros [B].
    """

    def __init__(
        self,
        reader: LogitReader,
        predict: Predict,
        metrics: Callable[[Task, When], Mapping[str, Metric]],
        who: str,
        whens: Sequence[When] = ("",),
        per_sample: bool = False,
        needs_targets: bool = True,
    ) -> None:
        self.reader = reader
        self.predict = predict
        self.metrics = metrics
        self.who = who
        self.whens = whens
        self.per_sample = per_sample
        self.needs_targets = needs_targets
        self._batch: Any = None
        self._error: Exception | None = None
        self._metrics: dict[tuple[int, When], dict[str, Metric]] = {}
        self._reasons: dict[int, str] = {}

    def keep(self, batch: Any) -> None:
        """Copy a batch, since the test step may change it in place."""
        self._batch = own_batch(batch)

    def update(self, trainer: Trainer, model: LightningModule, batch_idx: int, loader_idx: int) -> None:
        """Score the stored batch."""
        batch, self._batch = self._batch, None
        if batch is None or loader_idx in self._reasons or self._error is not None:
            return
        loader = loader_list(trainer.test_dataloaders)[loader_idx]
        try:
            with evaluating(model, trainer):
                self._score(trainer, model, batch, loader, batch_idx, loader_idx)
        except InputError as error:
            self._reasons[loader_idx] = str(error)
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._error = error  # raised on all ranks at the end; raised here, the other ranks would wait forever

    def _score(
        self, trainer: Trainer, model: LightningModule, batch: Any, loader: Any, batch_idx: int, loader_idx: int
    ) -> None:
        outputs, predictions = self.predict(model, batch, trainer, batch_idx == 0)
        target = outputs.new_zeros(outputs.shape[1])
        if self.needs_targets:
            values = batch_idx == 0 or is_free(outputs)
            target = labelled_batch(self.reader, model, batch, outputs, "the test data", values=values)
            target = target.to(outputs.device)
        keep = batches.unpadded_rows(loader, batch_idx, len(target))
        task = self.reader.task(model)
        rows = slice(None) if keep is None else keep.to(outputs.device)
        target = target[rows]
        if not len(target):
            return
        for when, prediction in predictions.items():
            metrics, part = self._of(model, loader_idx, when), prediction[rows]
            if self.needs_targets:
                update_all(metrics, task, part, target, per_sample=self.per_sample)
            else:
                for metric in metrics.values():
                    metric.update(part, target)

    def _of(self, model: LightningModule, loader_idx: int, when: When) -> Mapping[str, Metric]:
        if (loader_idx, when) not in self._metrics:
            found = self.metrics(self.reader.task(model), when)
            self._metrics[loader_idx, when] = {name: metric.to(model.device) for name, metric in found.items()}
        return self._metrics[loader_idx, when]

    def compute(self, trainer: Trainer, model: LightningModule) -> dict[str, Tensor]:
        """The values over all ranks, by name: ``test_nll``, ``test_nll_calibrated``, ... A collective."""
        raise_on_all_ranks(self._error, trainer)
        num_loaders = len(loader_list(trainer.test_dataloaders))
        reasons = first_of_ranks([self._reasons.get(i) for i in range(num_loaders)], trainer)
        values = {}
        for loader_idx, reason in enumerate(reasons):
            loader = f"/dataloader_idx_{loader_idx}" if num_loaders > 1 else ""
            if reason is not None:
                rank_zero_info(f"{self.who} logs no metrics of the test set{loader.replace('/', ', ')}: {reason}")
                continue
            for when in self.whens:
                for name, metric in self._of(model, loader_idx, when).items():
                    values[f"test_{name}{when}{loader}"] = metric.compute()
        return values

    def log(self, trainer: Trainer, model: LightningModule, prefix: str) -> None:
        """Log the values with a prefix, at the end of a test. A collective."""
        for name, value in self.compute(trainer, model).items():
            # Every rank has the same value; `sync_dist` only avoids a warning of Lightning.
            model.log(f"{prefix}{name}", value.float(), batch_size=1, sync_dist=True, add_dataloader_idx=False)


def log_fitted(trainer: Trainer, prefix: str, numbers: Mapping[str, float]) -> None:
    """Log fitted numbers after a training, to the Trainer's loggers and ``callback_metrics``. Infinite values are skipped."""
    named = {f"{prefix}{name}": value for name, value in numbers.items() if math.isfinite(value)}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
    for logger in trainer.loggers:
        logger.log_metrics(named, step=trainer.global_step)
