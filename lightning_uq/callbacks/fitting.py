"""The base of callbacks that fit tensors to a model: the fitted state, its weights, and its effect on predictions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_uq._lightning import state_key
from lightning_uq.callbacks.foreign import check_attachable
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.networks.fingerprint import same_weights, weights_fingerprint
from lightning_uq.networks.finite import NonFinite
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.predictions import Prediction
from lightning_uq.running.evaluation import evaluating
from lightning_uq.running.fit_pass import FitPass, FitProgress, ProgressError, files_of
from lightning_uq.running.fitted_state import FittedState, to_cpu
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.logits import LogitReader, UnpackBatch
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import raising_on_all_ranks
from lightning_uq.running.transforms import PredictionTransform, transforms_of
from lightning_uq.running.weights import WeightsCheck
from lightning_uq.tasks import Task, describe, task_to_config

Weights = Literal["auto", "best", "last"]


class FittingCallback(Callback, ABC):
    """Fits tensors to the weights of a model, without a Trainer. They are never used with other weights.

    A subclass defines what to fit (:meth:`fit_tensors`) and how it changes predictions (:meth:`transform`). The transform
    stays attached to a module of this package until the next fit or ``handle.remove()``. ``validate``, ``test`` and
    ``predict`` of a Trainer with this callback attach it again.

    Args:
        dataloader: Fitting data; None takes the subclass's default.
        weights: ``"best"`` fits on the best weights of this training: the file of the first ModelCheckpoint with a monitor and a
            saved file. It raises if there is none. ``"last"`` fits on the weights at the end of the training. ``"auto"`` takes the best
            weights, or else the last. It warns if the best file was deleted, or is that of an earlier fit with the same ModelCheckpoint.
        name: Distinguishes two callbacks of the same class.
        predict_fn: ``predict_fn(model, x) -> logits``, if ``forward`` does not return them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``; default ``(x, y)``, a bare ``x`` or a mapping with ``input``.
        output: What the model returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        task: What the outputs of an unmodified module mean: a :class:`~lightning_uq.tasks.Task` or its name. None: one label
            per input, from logits [B, C], or numbers if the first targets are numbers in the shape of the outputs (not with ``attach``).
        attach: Whether ``trainer.predict`` of an unmodified module returns this package's predictions, changed by the fit.
        nonfinite: How such predictions, and scores of a loader, treat an input row with NaN or infinity: ``"error"`` raises;
            ``"inf"`` gives it a score of plus infinity and probabilities of NaN.
        progress_dir: A folder into which a fit saves its sums after every ``save_every`` batches, one file per rank. If the process is killed, the
            next fit of the same weights, settings and data continues with the next batch, and removes the files at its end. The data must
            yield the same batches in the same order. A loader with ``state_dict`` and ``load_state_dict`` continues where it was; of any
            other loader, the batches that were read are read again, without running the network. None saves nothing. docs/streams.md shows it.
        save_every: Number of batches between two saves.

    Attributes:
        uq_ckpt_path: The checkpoint with weights and states: the one that the Trainer's fit or :func:`~lightning_uq.save_fitted` wrote,
            or that a test read. None if no such file is known, as after ``fit(model, loader)``.
        handle: Removes the transform from the module; None if none was attached.
    """

    def __init__(
        self,
        *,
        dataloader: Any = None,
        weights: Weights = "auto",
        name: str | None = None,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
        attach: bool = False,
        nonfinite: NonFinite = "error",
        progress_dir: str | Path | None = None,
        save_every: int = 1000,
    ) -> None:
        check_choice("weights", weights, ("auto", "best", "last"))
        self.dataloader = dataloader
        self.weights = weights
        self.name = name
        self.attach = attach
        check_choice("nonfinite", nonfinite, ("error", "inf"))
        self.nonfinite = nonfinite
        if progress_dir is not None and not self.can_continue:
            raise InputError(f"{type(self).__name__} cannot continue an interrupted fit. Leave out `progress_dir`.")
        check_integer("save_every", save_every, 1)
        self.progress_dir = progress_dir
        self.save_every = save_every
        self._progress: FitProgress | None = None  # of a fit that runs
        self.logits = LogitReader(predict_fn, unpack_batch, output, task, infers_task=not attach)
        self.uq_ckpt_path: str | None = None
        self.handle: RemovableHandle | None = None
        self._tensors: dict[str, Any] | None = None
        self._fingerprint: Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Read ``loader``, which has exactly the rows of this rank, and return the fitted state, equal on every rank."""

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:  # optional
        """Called whenever the fitted state changes, with None when it is cleared."""

    can_continue: ClassVar[bool] = False
    """Whether an interrupted fit can be continued, because :meth:`reading` makes all its passes over the data."""

    recalibrates: ClassVar[bool] = False
    """Whether the fit changes the probabilities or intervals of predictions."""

    is_flexible: ClassVar[bool] = False
    """Whether the fit overfits its rows so much that sets fitted to the same rows have too little coverage."""

    def reading(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> FitPass:
        """A pass of :meth:`fit_tensors` over its loader, which an interrupted fit continues."""
        return FitPass(loader, model, trainer, self.logits, self._progress)

    def preview(self, prediction: Prediction) -> Prediction:
        """The prediction in the type that it has after the fit, for checks before the training."""
        return prediction

    def transform(self) -> PredictionTransform | None:
        """How the fitted state changes predictions; None if it does not."""
        return None

    # ------------------------------------------------------------------ state

    @property
    def fitted(self) -> bool:
        """Whether the callback has a fitted state."""
        return self._tensors is not None

    @property
    def state_key(self) -> str:
        """The key in a checkpoint's ``callbacks``: the class, and the name if given."""
        return type(self).__qualname__ if self.name is None else state_key(self, name=self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on, as plain data. A state with other settings is rejected."""
        output = self.logits.read.output
        task = self.logits.given_task
        return {
            "predict_fn": self.logits.predict_fn is not None,
            "output": "custom" if callable(output) else output,
            "task": None if task is None else describe(task),
        }

    @property
    def _state(self) -> FittedState | None:
        if self._tensors is None:
            return None
        given, inferred = self.logits.given_task, self.logits.inferred_task
        task = None if given is None else task_to_config(given)
        return FittedState(self.settings, self._tensors, self._fingerprint, inferred, task=task)

    def state_dict(self) -> dict[str, Any]:
        """The fitted state as plain tensors, for a checkpoint; empty before a fit."""
        return {} if self._state is None else self._state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a fitted state.

        Raises:
            InputError: It is not a fitted state, a newer release wrote it, or it was fitted with other settings than this
                callback's. After an invalid state of another class, or a part of one, the callback is not fitted.
        """
        name = type(self).__name__
        state = FittedState.read(state_dict, f"The state of {self.state_key}")
        if state is None:
            raise InputError(f"{name} cannot load a state with keys {sorted(state_dict)}, which is not a fitted state.")
        refusal = state.refusal(self.settings, self.state_key)
        if refusal is not None:
            raise InputError(refusal)
        held, given = self._fingerprint, state.fingerprint
        if held is not None and (given is None or not torch.equal(held, given)):
            self.uq_ckpt_path = None  # it holds other weights
        try:
            self._set(state.tensors, state.fingerprint)
        except Exception as error:  # the state of another class may raise any error
            self._set(None, None)
            came = sorted(state.tensors) if isinstance(state.tensors, dict) else type(state.tensors).__name__
            raise InputError(f"The `tensors` of this state do not belong to {name}: {came}.") from error
        self.logits.inferred_task = state.inferred_task

    def _set(self, tensors: dict[str, Any] | None, fingerprint: Tensor | None) -> None:
        self._tensors, self._fingerprint = tensors, fingerprint
        self.restore_tensors(tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None}  # belongs to a module of this process

    # ------------------------------------------------------------------ without a Trainer

    def fit(self, model: nn.Module, loader: Any) -> Self:
        """Fit on the current weights of ``model``, without a Trainer, and return the callback.

        Raises:
            InputError: The loader or its data are invalid.
        """
        self._forget(model)
        self.logits.inferred_task, self.uq_ckpt_path = None, None
        loader = exact_loader(loader, name="argument `loader`")
        with self._fitting(model):
            tensors = self.fit_tensors(model, loader, None)
        self._set(to_cpu(tensors), weights_fingerprint(model))
        self._attach_to(model, verified=True)
        return self

    @contextmanager
    def _fitting(self, model: nn.Module, trainer: Trainer | None = None) -> Iterator[None]:
        """A context for :meth:`fit_tensors`."""
        with (
            self._saving_progress(model, trainer),
            torch.inference_mode(False),
            evaluating(model, trainer, fitting=True),
        ):
            yield

    @contextmanager
    def _saving_progress(self, model: nn.Module, trainer: Trainer | None) -> Iterator[None]:
        """A context for a fit that saves its sums, if there is a folder for them, and removes them at its end. A collective."""
        if self.progress_dir is None:
            yield
            return
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        own = {
            "max_rows": getattr(self, "max_rows", None),
            "device": str(device),
            "weights": weights_fingerprint(model),
        }
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        with raising_on_all_ranks(trainer):
            self._progress = FitProgress(
                self.progress_dir, self._progress_name, self.save_every, {**self.settings, **own}, rank, world
            )
        try:
            yield
        except ProgressError:
            raise
        except InputError:
            # The data or the arguments have to change, and then the sums, or the positions in the data, no longer hold.
            self._progress.remove()
            raise
        else:
            self._progress.remove()
        finally:
            self._progress = None

    @property
    def _progress_name(self) -> str:
        return type(self).__name__ if self.name is None else f"{type(self).__name__}-{self.name}"

    def _check_training(self, trainer: Trainer, model: nn.Module) -> None:
        """Reject a training whose weights could not continue an interrupted fit, or whose module ``attach`` cannot serve, before it runs."""
        if self.attach:
            check_attachable(model)
        found = [] if self.progress_dir is None else files_of(self.progress_dir, self._progress_name)
        with raising_on_all_ranks(trainer):
            if found:
                raise InputError(
                    f"`progress_dir` ({self.progress_dir}) holds an interrupted fit of {self._progress_name} ({found[0].name}), which a training with new "
                    f"weights cannot continue. Continue it with `fit(model, loader)` or `trainer.validate(model, loader, ckpt_path=...)`, or delete the files."
                )

    def check_fitted(self, model: nn.Module) -> None:
        """Check that there is a state, and that it was fitted on the current weights of ``model``.

        Raises:
            NotFittedError: There is no state, or it was fitted on other weights.
        """
        name = type(self).__name__
        if self._tensors is None:
            raise NotFittedError(f"{name} is not fitted: train with it, or call `fit(model, loader)`.")
        if self._fingerprint is None:
            raise NotFittedError(
                f"{name} does not know its model's weights, because it was fitted to predictions in memory or read from a file or text. Pass predictions "
                "to `change`, call `fit(model, loader)`, or use `load_fitted` for a file that also holds the weights."
            )
        if not same_weights(self._fingerprint, weights_fingerprint(model), model):
            path = "" if self.uq_ckpt_path is None else f" ({self.uq_ckpt_path})"
            raise NotFittedError(
                f"{name} was fitted on other weights than this model's. Load the weights of the fit{path}, or call "
                "`fit(model, loader)` again."
            )

    def attach_to(self, module: nn.Module) -> RemovableHandle | None:
        """Attach the fitted state to the predictions of a module, as a fit does itself; for instance after ``load_state_dict``.

        Returns:
            A handle whose ``remove()`` detaches it; None for a foreign module, or if predictions do not change.

        Raises:
            NotFittedError: There is no state, or it was fitted on other weights than the module's.
        """
        self.check_fitted(module)
        return self._attach_to(module, verified=True)

    def _attach_to(self, module: nn.Module, *, verified: bool) -> RemovableHandle | None:
        transforms = transforms_of(module)
        transform = None if transforms is None else self.transform()
        if transforms is None or transform is None:
            return None
        assert self._fingerprint is not None
        check = WeightsCheck(self._fingerprint)
        if verified:
            check.accept(module)
        self.handle = transforms.attach(transform, self.state_key, check, self.uq_ckpt_path)
        return self.handle

    def _forget(self, module: nn.Module) -> None:
        """Clear the state, and remove its transform from the module."""
        self._set(None, None)
        self.handle = None
        transforms = transforms_of(module)
        if transforms is not None:
            transforms.detach(self.state_key)
