"""Figures of calibration at the end of each validation and test."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_uq import batches
from lightning_uq.callbacks.calibrating import calibrating_transforms
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.lightning_trees import is_instance
from lightning_uq.loggers.curves import Curve, Sums, make_curve
from lightning_uq.loggers.figures import log_figure
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.report import new_figure
from lightning_uq.running.batch_prediction import predict_batch
from lightning_uq.running.classes import labelled_batch
from lightning_uq.running.evaluation import evaluating
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.logits import LogitReader, UnpackBatch
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import gather_objects, raise_on_all_ranks
from lightning_uq.running.step_input import StepInput
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Task

Stage = Literal["val", "test"]
_DATA: dict[Stage, str] = {"val": "the validation data", "test": "the test data"}


class LogFigures(Callback):
    """Draw how calibrated a module is, and write the figure to the Trainer's loggers, after each validation and test.

    A module that predicts classes or labels gets a reliability diagram, ``val_reliability`` or ``test_reliability``; one that predicts
    distributions or quantiles of numbers gets the coverage of its central intervals, ``val_coverage`` or ``test_coverage``. With several
    loaders ``/dataloader_idx_0`` and so on stands behind the name. :func:`~lightning_uq.loggers.log_figure` says where each logger has
    it.

    The figures of this package's modules are those of their predictions, with all calibrations that they carry. Of any other
    LightningModule they are those of its outputs, in a test as the Trainer's fitted callbacks calibrate them. They cost one more forward pass per batch, in evaluation mode and with an isolated random
    state, on a copy of the batch. Bins are kept, not rows. Each sample counts once on any number of ranks. A sanity check before
    the training draws nothing.

    A loader whose batches cannot be read, such as one without labels, has no figure, and one warning says why.

    Args:
        num_bins: Number of bins of a reliability diagram.
        predict_fn: ``predict_fn(model, x)`` gives what ``output`` reads, where ``forward`` does not give the outputs.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What a module that is not ours returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the outputs.
        task: What the outputs of a module that is not ours mean: a Task or its name. None: one label per input, or what the
            targets of the batches show.

    Raises:
        InputError: ``num_bins`` is less than 1, or the Trainer has two such callbacks.
        MissingExtraError: matplotlib is not installed; raised before anything runs.
        UnsupportedError: Under FSDP, DeepSpeed or model parallelism, or with a step that takes ``dataloader_iter``.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> trainer = Trainer(callbacks=[LogFigures()], logger=CSVLogger("runs"), accelerator="cpu")
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        *,
        num_bins: int = 15,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_bins", num_bins, 1)
        self.num_bins = num_bins
        self.read = LogitReader(predict_fn, unpack_batch, output, task)
        self._step_input = StepInput()
        self._warned: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._batch: Any = None
        self._curves: dict[int, Curve] = {}
        self._reasons: dict[int, str] = {}
        self._error: Exception | None = None
        self._calibrations: list[PredictionTransform] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise errors for unsupported settings before anything runs."""
        new_figure(1, 1)
        check_strategy(trainer, type(self).__name__)
        if sum(is_instance(one, LogFigures) for one in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise InputError(
                "The Trainer has several LogFigures, which would write the same figures. Keep one of them."
            )
        for step in (pl_module.validation_step, pl_module.test_step):
            if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
                raise UnsupportedError(
                    "LogFigures does not support steps that take `dataloader_iter`, because hooks then do not receive the batch."
                )
        self._step_input = StepInput()

    # ------------------------------------------------------------------ hooks

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._reset()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._reset()
        self.read.inferred_task = None  # the test set may be another one

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch."""
        self._keep(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch."""
        self._keep(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._add_kept(trainer, pl_module, "val", batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._add_kept(trainer, pl_module, "test", batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._log(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._log(trainer, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the sums."""
        self._step_input.drop()
        self._reset()

    # ------------------------------------------------------------------ sums

    def _keep(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        if not trainer.sanity_checking and trainer.loggers:
            self._batch = batches.own_batch(batch)
            self._step_input.start_reading(model, batch, self.read)

    def _add_kept(
        self, trainer: Trainer, model: LightningModule, stage: Stage, batch_idx: int, loader_idx: int
    ) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self._step_input.end(model, "validation_step" if stage == "val" else "test_step")
        if loader_idx in self._reasons or self._error is not None:
            return
        try:
            with evaluating(model, trainer):
                self._add(trainer, model, stage, batch, batch_idx, loader_idx)
        except InputError as error:
            self._reasons[loader_idx] = str(error)
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._error = error  # raised with the other ranks at the end: now they would wait for this one

    def _add(
        self, trainer: Trainer, model: LightningModule, stage: Stage, batch: Any, batch_idx: int, loader_idx: int
    ) -> None:
        self.read.look_at_task(model, batch, trainer, is_first=not self._curves)
        if self._calibrations is None:  # the callbacks have verified their states at the first batch
            self._calibrations = calibrating_transforms(trainer, model, self.read) if stage == "test" else []
        outputs, prediction = predict_batch(
            self.read, model, batch, trainer, check=batch_idx == 0, further=self._calibrations
        )
        target = labelled_batch(self.read, model, batch, outputs, _DATA[stage]).to(outputs.device)
        keep = batches.unpadded_rows(_loaders(trainer, stage)[loader_idx], batch_idx, len(target))
        rows = slice(None) if keep is None else keep.to(outputs.device)
        target = target[rows]
        if len(target):
            task = self.read.task(model)
            if loader_idx not in self._curves:
                self._curves[loader_idx] = make_curve(task, self.num_bins, model.device)
            self._curves[loader_idx].add(task, prediction[rows], target)

    # ------------------------------------------------------------------ figures

    def _log(self, trainer: Trainer, stage: Stage) -> None:
        """Sum over the ranks, draw on rank 0. A collective."""
        if trainer.sanity_checking or not trainer.loggers:
            return
        raise_on_all_ranks(self._error, trainer)
        own = {loader_idx: (type(curve), curve.sums()) for loader_idx, curve in self._curves.items()}
        of_ranks = gather_objects((own, self._reasons), trainer)
        number = len(_loaders(trainer, stage))
        for loader_idx in range(number):
            loader = f"/dataloader_idx_{loader_idx}" if number > 1 else ""
            reason = next((reasons[loader_idx] for _, reasons in of_ranks if loader_idx in reasons), None)
            if reason is not None:
                self._warn(f"LogFigures draws no figure for {_DATA[stage]}{loader.replace('/', ', ')}: {reason}")
                continue
            found = [curves[loader_idx] for curves, _ in of_ranks if loader_idx in curves]
            if found and trainer.is_global_zero:
                kind = found[0][0]
                title = f"{_DATA[stage][4:].capitalize()}, step {trainer.global_step:,}"
                figure = kind.figure(_total([sums for _, sums in found]), title)
                log_figure(trainer, f"{stage}_{kind.name}{loader}", figure)
        self._reset()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)


def _loaders(trainer: Trainer, stage: Stage) -> list[Any]:
    return loader_list(trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders)


def _total(sums: list[Sums]) -> Sums:
    """The sums of all ranks; each lacks the keys that its rows did not have."""
    keys = {key for one in sums for key in one}
    return {key: torch.stack([one[key] for one in sums if key in one]).sum(0) for key in keys}
