"""The base of all callbacks that fit something after training, designed so that none of them is ever silently wrong.

A fitted state belongs to one set of weights. This base fits on these weights, stores the state with them in a checkpoint, and
checks in every validation, test and prediction whether the weights in memory are those of the fit.
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_uq._lightning import starts_processes
from lightning_uq.batches import own_batch
from lightning_uq.callbacks.fitting import FittingCallback
from lightning_uq.callbacks.fitting_data import FittingData, ValidationData
from lightning_uq.callbacks.foreign import check_reading, unwrap_predict_step, unwrapped, wrap_predict_step
from lightning_uq.callbacks.label_checks import SeenBatch, all_targets
from lightning_uq.callbacks.sibling import write_sibling
from lightning_uq.callbacks.verification import Fit, decide
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.fingerprint import weights_fingerprint
from lightning_uq.networks.sharding import GatheredStage
from lightning_uq.running.averages import averaged_copies
from lightning_uq.running.best_weights import BestCheckpoint, weights_of
from lightning_uq.running.classes import check_targets
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.fitted_state import to_cpu
from lightning_uq.running.loaders import can_be_reread, check_loader, exact_loader
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.running.ranks import raise_on_all_ranks, raising_on_all_ranks
from lightning_uq.running.step_input import StepInput
from lightning_uq.running.weights import WeightsMark, parameters_mark
from lightning_uq.strategies import check_strategy


class PostTrainingCallback(FittingCallback):
    """Fits tensors in ``on_train_end``, stores them with their weights, and never uses them with others.

    A subclass defines what to fit (:meth:`fit_tensors`), on which data by default (:attr:`fitting_data`), and how it changes predictions
    (:meth:`transform`). After a fit, ``uq_ckpt_path`` names a checkpoint with the weights and the fitted states of all such callbacks: a copy
    ``<best>-uq.ckpt`` beside the best checkpoint, or ``uq-last.ckpt``. ``validate``, ``test`` and ``predict`` find it automatically. If the
    weights differ, the callbacks refit from the known loader, or an error explains what to do.

    A fit attaches the transform to a module of this package, so ``module.predict(x)`` equals ``trainer.predict``, and a Trainer without this
    callback uses it too. The next fit or ``handle.remove()`` detaches it, but a Trainer with this callback attaches it again when it runs.

    Args:
        fitting: Arguments of :class:`FittingCallback`.
    """

    _known_loader: Any = None  # the loader of this process's last fit
    _checks_epoch = False  # whether it checks the targets of the first epoch
    waits = False  # whether it waits for the first batch of the training, as the loader could not be read before
    _seen: SeenBatch | None = None
    _label_error: Exception | None = None
    _verified = False
    _trained: WeightsMark | None = None  # the parameters before the hooks of a validation run
    _warned_of_exchange = False

    def __init__(self, **fitting: Any) -> None:
        super().__init__(**fitting)
        self._step_input = StepInput()
        self._best = BestCheckpoint()
        self._gathered = GatheredStage()

    # ------------------------------------------------------------------ for subclasses

    fitting_data: ClassVar[FittingData] = ValidationData()
    """The fitting data if no ``dataloader`` was given."""

    runs_sharded: ClassVar[bool] = False
    """Whether the fit was tested with a model sharded by FSDP2."""

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:  # optional
        """Raise the errors of :meth:`fit_tensors` before the training, as far as one batch shows them."""

    def fits_targets(self, model: nn.Module) -> bool:
        """Whether the fit depends on targets, which are then checked before it."""
        return False

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:  # optional
        """Raise the errors of the fit about the targets [N, ...] of all rows before the training."""

    def note_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:  # optional
        """Record the checked targets of one batch of the first epoch; outputs [Z, 1, ...] are those of one row."""

    def review_noted_targets(self, trainer: Trainer) -> None:  # optional
        """Warn about the targets of the first epoch. Called on all ranks."""

    def __getstate__(self) -> dict[str, Any]:
        # A loader may hold worker processes or open files, and a mark refers to tensors of this process.
        return {**super().__getstate__(), "_known_loader": None, "_trained": None}

    # ------------------------------------------------------------------ fitting under a Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject untested strategies and contradictory arguments, and discard earlier verifications."""
        check_strategy(trainer, type(self).__name__, runs_sharded=self.runs_sharded)
        for one in post_training_callbacks(trainer):
            if one.attach and self.attach and not is_uncertainty_module(pl_module):
                check_reading(pl_module, (one.logits, one.nonfinite), (self.logits, self.nonfinite))
        self._verified, self._step_input, self._best = False, StepInput(), BestCheckpoint()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the best checkpoint of the training that a fit resumes."""
        self._best.note_resumed(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the state, and raise errors now that would otherwise come after the training."""
        self._forget(pl_module)
        self.logits.inferred_task = self.uq_ckpt_path = None
        self._seen = self._label_error = None
        self._checks_epoch, self.waits, self._warned_of_exchange, self._trained = True, False, False, None
        self._best.start(trainer, type(self).__name__, is_required=self.weights == "best")
        self._check_training(trainer, pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for later in callbacks[callbacks.index(self) + 1 :]:
            if is_instance(later, WeightAveraging, StochasticWeightAveraging):
                raise InputError(
                    f"{type(self).__name__} stands before {type(later).__name__} in the Trainer's callbacks, so it would be "
                    "fitted on weights that are not averaged yet. Swap them."
                )
        loader = self._fitting_loader(trainer)
        check_loader(loader, "argument `dataloader`")
        self.try_fit(trainer, pl_module, loader)

    def try_fit(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        """Check the first batch. Runs eagerly, since nothing is compiled yet.

        Raises:
            InputError: There is no batch, or :meth:`check_batch` raises.
        """
        with raising_on_all_ranks(trainer), evaluating(pl_module, trainer, fitting=True):
            for batch in exact_loader(loader, name="argument `dataloader`", limit=1):
                seen = self.try_batch(trainer, pl_module, to_device(batch, pl_module, trainer))
                if seen is not None:
                    self._check_targets(trainer, pl_module, loader, seen)
                return
            raise InputError(f"{type(self).__name__}'s fitting data are empty.")

    def try_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> SeenBatch | None:
        """Check a batch and return its outputs and targets; None if the fit does not depend on targets."""
        with torch.compiler.set_stance("force_eager"), self.logits.trying():
            self.check_batch(pl_module, batch, trainer)
            if self.attach:
                self.logits.check_default_task(pl_module, batch)
                self.logits(pl_module, batch, trainer)  # predictions will be made of them
            _, target = self.logits.unpack(pl_module, batch)
            if not self.fits_targets(pl_module) or not isinstance(target, Tensor):
                return None
            outputs = self.logits(pl_module, batch, trainer, check=False)[:, :1]
            return SeenBatch.of(self.logits.task(pl_module), outputs, target)

    def has_own_data(self, trainer: Trainer) -> bool:
        """Whether the fitting data differ from those of the training and of its validation."""
        return self.dataloader is not None or self.fitting_data.is_read_apart(trainer)

    def _check_targets(self, trainer: Trainer, model: LightningModule, loader: Any, seen: SeenBatch) -> None:
        """Check the targets of all rows, or do so during the first epoch if only its batches show them."""
        own = self.has_own_data(trainer)
        limit = None if self.dataloader is not None or trainer.fast_dev_run else self.fitting_data.limit(trainer)  # type: ignore[attr-defined]
        limit = limit * trainer.world_size if isinstance(limit, int) else limit  # for all ranks
        read = own and can_be_reread(loader)
        targets = all_targets(loader, seen, lambda raw: self.logits.unpack(model, raw)[1], limit, read=read)
        if targets is not None:
            self.check_all_targets(model, targets, seen.outputs_for(targets))
        elif not own:
            self._seen = seen

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the parameters before the hooks of a validation."""
        self._remember(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the parameters before the module's validation hooks."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._remember(trainer, pl_module)

    def _remember(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_first = self is post_training_callbacks(trainer)[0]  # only one callback warns
        if is_first and not self._warned_of_exchange and not list(averaged_copies(trainer)):
            self._trained = parameters_mark(pl_module)

    def _check_for_exchange(self, pl_module: LightningModule) -> None:
        """Warn once per fit if validation hooks put other weights into the module."""
        before, self._trained = self._trained, None
        if before is not None and before != parameters_mark(pl_module):
            self._warned_of_exchange = True
            rank_zero_warn(
                f"{type(pl_module).__name__} has other weights in validation than in training: a hook such as "
                f"`on_validation_start` exchanges them. {type(self).__name__} and other fits after the training use the weights without "
                "these hooks: the last ones, or those of the best checkpoint. To test with the exchanged weights (an average, for example), "
                "put them into the module and call `fit(module, loader)`, or let Lightning's EMAWeightAveraging keep the average."
            )

    def check_epoch_targets(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Check the targets of a batch of the first epoch; several ranks raise together at its end."""
        if not self._checks_epoch or self._label_error is not None or (self._seen is None and not self.waits):
            return
        try:
            if self.waits:
                self.waits = False
                with evaluating(pl_module, trainer, fitting=True):
                    self._seen = self.try_batch(trainer, pl_module, own_batch(batch))
                if self._seen is None:
                    return
            assert self._seen is not None
            _, target = self.logits.unpack(pl_module, batch)
            if target is not None and self._seen.is_alike(target):
                target = target.cpu()
                where = f"{type(self).__name__}'s fitting data"
                check_targets(self.logits, pl_module, target, self._seen.outputs_for(target), where)
                self.note_targets(pl_module, target, self._seen.outputs)
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._label_error = error

    def end_epoch_check(self, trainer: Trainer) -> None:
        """End the check of an epoch's targets. A collective after the first epoch."""
        if not self._checks_epoch:
            return
        raise_on_all_ranks(self._label_error, trainer)
        if not trainer.sanity_checking:
            self.review_noted_targets(trainer)
            self._checks_epoch = self.waits = False
            self._seen = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit while the strategy is still set up: in ``on_fit_end`` the module is already back on the CPU."""
        loader = self._fitting_loader(trainer)
        best = None
        if self.weights != "last":
            best = self._best.find(trainer, type(self).__name__, is_required=self.weights == "best")
        with weights_of(best, trainer, pl_module):
            self._fit(trainer, pl_module, loader)
            self._write(best, trainer, pl_module)
        self._known_loader = loader
        self._attach_to(pl_module, verified=False)
        self._verified = False
        if starts_processes(trainer) and self is post_training_callbacks(trainer)[-1]:
            self._warn_of_ending_processes(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clear the state after an interrupted fit, and restore ``predict_step`` after an interrupted prediction."""
        unwrap_predict_step(pl_module)
        self._gathered.end()
        self._step_input.drop()
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget(pl_module)

    def _fitting_loader(self, trainer: Trainer) -> Any:
        return (
            self.dataloader if self.dataloader is not None else self.fitting_data.loader(trainer, type(self).__name__)
        )

    def _fit(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        limit = None if self.dataloader is not None else self.fitting_data.limit(trainer)
        self._forget(pl_module)
        try:
            self._fit_batches(trainer, pl_module, loader, limit)
        except InputError as error:
            if limit is None or not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise
            # A density needs rows of every class, which the few batches of a trial run may lack.
            rank_zero_info(
                f"{type(self).__name__} reads all of its fitting data, since the batches of `fast_dev_run` are not enough: {error}"
            )
            self._fit_batches(trainer, pl_module, loader, None)

    def _fit_batches(
        self, trainer: Trainer, pl_module: LightningModule, loader: Any, limit: int | float | None
    ) -> None:
        with self._fitting(pl_module, trainer), unwrapped(pl_module):
            exact = exact_loader(loader, trainer, name="argument `dataloader`", limit=limit)
            tensors = self.fit_tensors(pl_module, exact, trainer)
            self.logits.agree_on_task(pl_module, trainer)
        self._set(to_cpu(tensors), weights_fingerprint(pl_module))

    def _write(self, best: str | None, trainer: Trainer, pl_module: LightningModule) -> None:
        ours = post_training_callbacks(trainer)
        states = {one.state_key: one._state if one._has_weights_of(self) else None for one in ours}
        path = write_sibling(best, states, [one.uq_ckpt_path for one in ours], trainer, pl_module)
        if path is None:
            rank_zero_info(
                f"{type(self).__name__} wrote no file: no ModelCheckpoint has a directory. `save_fitted` writes one."
            )
        else:
            self.uq_ckpt_path = path

    def _warn_of_ending_processes(self, trainer: Trainer) -> None:
        """Warn that Lightning returns the last weights from the processes that it started, but not the state of callbacks."""
        if self.uq_ckpt_path is None:
            rest = "No file holds the fitted states: add a ModelCheckpoint, and pass the -uq.ckpt as `ckpt_path`."
        else:
            path = self.uq_ckpt_path
            rest = f"Use the file that holds the fitted states: `trainer.test` and `trainer.predict` take `ckpt_path={path!r}`, and `load_fitted({path!r})` returns a calibrated network."
        rank_zero_warn(
            f"{type(trainer.strategy).__name__} trains in separate processes, so the callbacks of the main process "
            f"are not fitted after `trainer.fit`, and `module.predict` is not calibrated there. {rest}"
        )

    def _has_weights_of(self, other: "PostTrainingCallback") -> bool:
        mine, theirs = self._fingerprint, other._fingerprint
        return mine is not None and theirs is not None and torch.equal(mine, theirs)

    # ------------------------------------------------------------------ verification of the weights in memory

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Verify at the first batch of ``trainer.validate``, after any exchange of weights. During a training, look for an exchange, and record the input of a step."""
        self._check_for_exchange(pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._verify(trainer, pl_module)
        self._step_input.start_reading(pl_module, batch, self.logits)
        if isinstance(self.fitting_data, ValidationData):
            self.check_epoch_targets(trainer, pl_module, batch)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Verify at the first batch of ``trainer.test``, and record the input of the module's step."""
        self._verify(trainer, pl_module)
        self._step_input.start_reading(pl_module, batch, self.logits)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Compare the input of the module's step with the input that is read."""
        self._step_input.end(pl_module, "validation_step")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Compare the input of the module's step with the input that is read."""
        self._step_input.end(pl_module, "test_step")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the parameters of a sharded model: for a prediction, Lightning may give a rank one batch less than another."""
        self._gathered.start(pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Verify at the first batch of ``trainer.predict``. With ``attach``, replace the predictions of a foreign module."""
        if self._verify(trainer, pl_module) and self.attach and not is_uncertainty_module(pl_module):
            wrap_predict_step(pl_module, self.logits, self.transform(), self.nonfinite)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify on a rank without batches, since the others wait for it, and end the check of the first validation's targets."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._verify(trainer, pl_module)
        if isinstance(self.fitting_data, ValidationData):
            self.end_epoch_check(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify on a rank without batches, since the others wait for it."""
        self._verify(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify on a rank without batches, since the others wait for it."""
        self._verify(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the ``predict_step`` of a foreign module, and the shards of its parameters."""
        unwrap_predict_step(pl_module)
        self._gathered.end()

    def _verify(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Use the state in memory, else a sibling file, else refit, else raise; once per stage. Returns whether it ran now."""
        if self._verified:
            return False
        name, loader = type(self).__name__, self._known_loader if self.dataloader is None else self.dataloader
        fit = Fit(name, self.state_key, self.settings, self._fingerprint, self.uq_ckpt_path, loader is not None)
        decision = decide(fit, trainer, pl_module)
        if decision.action == "error":
            raise NotFittedError(decision.text)
        if decision.action == "load":
            assert decision.state is not None
            self.load_state_dict(decision.state)
            self.uq_ckpt_path = decision.text
            rank_zero_info(f"{name} took its fitted state from {decision.text}.")
        elif decision.action == "keep":
            # Under spawn, or with one rank restored, another rank may hold nothing: rank 0's state is everybody's.
            if trainer.world_size > 1:
                self.load_state_dict(trainer.strategy.broadcast(self.state_dict()))
        else:
            if self._fingerprint is None:
                rank_zero_info(f"{name} was fitted on the weights in memory, with the data of argument `dataloader`.")
            else:
                rank_zero_warn(
                    f"{name} was fitted on other weights than those in memory, so it was fitted again from the same loader. To "
                    "use the weights of the first fit, pass `ckpt_path`."
                )
            self._fit(trainer, pl_module, loader)
        self._attach_to(pl_module, verified=True)
        self._verified = True
        return True


def post_training_callbacks(trainer: Trainer) -> list[PostTrainingCallback]:
    """The callbacks of a Trainer that fit after training, in order."""
    return [one for one in trainer.callbacks if isinstance(one, PostTrainingCallback)]  # type: ignore[attr-defined]
