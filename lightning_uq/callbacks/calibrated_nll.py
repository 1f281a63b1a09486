"""A validation loss that ignores miscalibration, for choosing the checkpoint to calibrate."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_uq import batches
from lightning_uq.errors import InputError
from lightning_uq.functional.temperature_sums import calibrated_nll_of_sums
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.running.classes import check_calibration
from lightning_uq.running.evaluation import evaluating
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.logits import LogitReader, UnpackBatch
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import raise_on_all_ranks
from lightning_uq.running.temperature_reader import TemperatureReader
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Task


class CalibratedNLL(Callback):
    """Logs ``val_nll_calibrated``, the validation NLL after fitting a temperature to the same rows, for any classifier.

    The validation NLL mixes two things: how well classes are separated, and how well confidences are scaled. It starts to
    rise when the scaling deteriorates, long before the separation has peaked. A temperature repairs the scaling after
    training, so the checkpoint to keep is the one with the lowest NLL after a temperature (refine, then calibrate)::

        Trainer(callbacks=[CalibratedNLL(), TemperatureScaling(), ModelCheckpoint(monitor="val_nll_calibrated")])

    The value is logged at the end of each validation. ``ModelCheckpoint``, ``EarlyStopping`` and ``ReduceLROnPlateau`` can
    monitor it at any position among the callbacks, because they read it after all callbacks have logged. Each sample counts
    once on any number of ranks. The cost is one more forward pass per validation batch, in evaluation mode and with an
    isolated random state. For an ensemble, the pooled prediction is scored. The sanity check before training logs nothing.

    Args:
        predict_fn: ``predict_fn(model, x) -> logits``, if ``forward`` does not return them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What the model returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        task: What the outputs of a foreign module mean: a Task or its name. None: one label per input.
        dataloader_idx: Index of the validation loader, if there are several.

    Raises:
        InputError: At the first validation batch, if it has no class labels or the model returns no logits.
        UnsupportedError: Under FSDP, DeepSpeed or model parallelism.

    Source: Berta et al., "Rethinking early stopping: refine, then calibrate" (arXiv 2501.19195).

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [CalibratedNLL(), ModelCheckpoint(monitor=CalibratedNLL.monitor)]
        >>> callbacks[1].monitor
        'val_nll_calibrated'
    """

    monitor = "val_nll_calibrated"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        *,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
        dataloader_idx: int = 0,
    ) -> None:
        super().__init__()
        self.read = LogitReader(predict_fn, unpack_batch, output, task)
        self.dataloader_idx = dataloader_idx
        self._reset()

    def _reset(self) -> None:
        self._sums = TemperatureReader(self.read, type(self).__name__, "the validation data")
        self._batch: Any = None
        self._error: Exception | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject untested strategies and tasks without classes."""
        check_strategy(trainer, type(self).__name__)
        check_calibration(self.read.task(pl_module), type(self).__name__)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the sums."""
        self._reset()
        number = len(loader_list(trainer.val_dataloaders))
        if not 0 <= self.dataloader_idx < number:
            raise InputError(
                f"`dataloader_idx` must be the index of one of the {number} validation loaders, but it is {self.dataloader_idx}."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch, since the validation step may change it in place."""
        if dataloader_idx == self.dataloader_idx:  # also in the sanity check, so that errors come before the training
            self._batch = batches.own_batch(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch's pooled log-probabilities to the sums."""
        batch, self._batch = self._batch, None
        if batch is None or self._error is not None:
            return
        loader = loader_list(trainer.val_dataloaders)[dataloader_idx]
        try:
            with evaluating(pl_module, trainer):
                self._sums.add(pl_module, batch, trainer, lambda num: batches.distributed_rows(loader, batch_idx, num))
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._error = error  # raised on all ranks at the end; raised here, the other ranks would wait forever

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the value computed from the sums of all ranks."""
        raise_on_all_ranks(self._error, trainer)
        if trainer.sanity_checking:
            return
        value = torch.tensor(calibrated_nll_of_sums(self._sums.gather_sums(trainer)[0]))
        # Every rank has the same value; `sync_dist` only avoids a warning of Lightning.
        pl_module.log(self.monitor, value, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the sums."""
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report an empty validation loader, for which Lightning calls no other hook."""
        if stage == "validate":
            batches.check_not_empty(trainer, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Reset the sums."""
        self._reset()
