"""What a callback that fits something after training needs, so that it is never silently wrong.

Fitted state belongs to one set of weights. This base fits it on those weights, keeps it beside them in a checkpoint, and
recognises at validation, test and prediction whether the weights in memory are the ones it was fitted on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_uq.callbacks._loaders import check_loader, exact_loader
from lightning_uq.callbacks._running import (
    LogitReader,
    PredictFn,
    UnpackBatch,
    evaluating,
    is_uncertainty_module,
    to_device,
)
from lightning_uq.checkpoint_files import check_plain, finish_writing, read_checkpoint, reading, write_checkpoint
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.networks.fingerprint import same_weights, weights_fingerprint
from lightning_uq.networks.output import Output
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.strategies import check_strategy

Weights = Literal["best", "last"]

WRITTEN_BY = "lightning_uq_written_by"
"""Key in a ``-uq.ckpt``: which LightningModule it was fitted on, as plain data."""

_WHY_PLAIN = (
    "the best checkpoint is read back with `weights_only=True`. Leave it out, `save_hyperparameters(ignore=[{name!r}])`, or "
    'pass `weights="last"`.'
)


class PostTrainingCallback(Callback, ABC):
    """Fits tensors in ``on_train_end``, stores them with the weights they belong to, and never uses them with others.

    A subclass says what to fit (:meth:`fit_tensors`), on which loader by default (:meth:`default_loader`), and what to do
    with it. After a fit, ``uq_ckpt_path`` names a checkpoint that holds the weights and the fitted states of all such
    callbacks: a copy ``<best>-uq.ckpt`` beside the best checkpoint, or ``uq-last.ckpt``. ``validate``, ``test`` and
    ``predict`` find it by themselves; where the weights are others, they refit from the loader that is known, or say
    what to do.

    Args:
        dataloader: Fitting data; None for the subclass's default.
        weights: ``"best"`` fits on the weights of a ModelCheckpoint that has a monitor and saved a file, else the last;
            ``"last"`` on those at the end of training.
        name: Tells two callbacks of one class apart.
        predict_fn: ``predict_fn(model, x) -> logits``, where ``forward`` does not give them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What the model returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        attach: Whether the predictions of a module that is not ours are replaced by ours, with what was fitted.
    """

    def __init__(
        self,
        *,
        dataloader: Any = None,
        weights: Weights = "best",
        name: str | None = None,
        predict_fn: PredictFn | None = None,
        unpack_batch: UnpackBatch | None = None,
        output: Output = "logits",
        attach: bool = False,
    ) -> None:
        if weights not in ("best", "last"):
            raise InputError(f"Expected argument `weights` to be 'best' or 'last', but got {weights!r}.")
        self.dataloader = dataloader
        self.weights = weights
        self.name = name
        self.attach = attach
        self.logits = LogitReader(predict_fn, unpack_batch, output)
        self.uq_ckpt_path: str | None = None
        self._tensors: dict[str, Any] | None = None
        self._fingerprint: Tensor | None = None
        self._known_loader: Any = None  # what this process fitted with
        self._verified = False

    # ------------------------------------------------------------------ what a subclass provides

    @abstractmethod
    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Read ``loader`` (already exact for this rank) and return the fitted state; the same on every rank."""

    @abstractmethod
    def default_loader(self, trainer: Trainer) -> Any:
        """The fitting data where no ``dataloader`` was given, or an :class:`InputError` that says what to pass."""

    def loader_limit(self, trainer: Trainer) -> int | float | None:
        """At most so many batches of the default loader."""
        return None

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:  # optional
        """Called whenever the fitted state changes; None when it is cleared."""

    @contextmanager
    def attaching(self, model: nn.Module) -> Iterator[Callable[[Prediction], Prediction]]:
        """A context around one call of the model; what it yields then adds what was fitted to the prediction."""
        yield lambda prediction: prediction

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:  # optional
        """Raise, before the training, what :meth:`fit_tensors` would raise after it, as far as one batch tells."""

    # ------------------------------------------------------------------ state

    @property
    def fitted(self) -> bool:
        """Whether there is a fitted state."""
        return self._tensors is not None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``callbacks``: the class, and the name where there is one."""
        return type(self).__qualname__ if self.name is None else self._generate_state_key(name=self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on, as plain data: a state that was fitted under other settings is not this callback's."""
        output = self.logits.read.output
        return {"predict_fn": self.logits.predict_fn is not None, "output": "custom" if callable(output) else output}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, or nothing before a fit: what a checkpoint holds."""
        if self._tensors is None:
            return {}
        return {"version": 1, "settings": self.settings, "tensors": self._tensors, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a fitted state back.

        Raises:
            InputError: It is no such state, or was fitted under other settings than this callback has. One of another class,
                or a part of one, leaves nothing fitted.
        """
        if not _is_state(state_dict):
            raise InputError(
                f"Expected a fitted state of {type(self).__name__}, version 1, but got {sorted(state_dict)}."
            )
        refusal = self._refusal(state_dict)
        if refusal is not None:
            raise InputError(refusal)
        tensors = state_dict["tensors"]
        try:
            self._set(tensors, state_dict["fingerprint"])
        except Exception as error:  # what another class fitted raises anything at all
            self._set(None, None)
            held = sorted(tensors) if isinstance(tensors, dict) else type(tensors).__name__
            raise InputError(
                f"Expected a fitted state of {type(self).__name__}, but its `tensors` are another's: {held}."
            ) from error

    def _refusal(self, state: dict[str, Any]) -> str | None:
        """Why a fitted state is not this callback's, or None."""
        theirs, ours = state["settings"], self.settings
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if not differing:
            return None
        return (
            f"Expected the state of {self.state_key!r} to be fitted with "
            + ", ".join(f"{key}={ours.get(key)!r}" for key in differing)
            + ", as this callback is set, but it was fitted with "
            + ", ".join(f"{key}={theirs.get(key)!r}" for key in differing)
            + ". Set the callback alike, or give it a `name` of its own."
        )

    def _set(self, tensors: dict[str, Any] | None, fingerprint: Tensor | None) -> None:
        self._tensors, self._fingerprint = tensors, fingerprint
        self.restore_tensors(tensors)

    def __getstate__(self) -> dict[str, Any]:
        # A loader may hold worker processes or open files: it stays with the process that used it.
        return {**self.__dict__, "_known_loader": None}

    # ------------------------------------------------------------------ without a Trainer

    def fit(self, model: nn.Module, loader: Any) -> "PostTrainingCallback":
        """Fit on the weights that ``model`` now has, without a Trainer; gives back the callback itself."""
        self._set(None, None)
        loader = exact_loader(loader, name="argument `loader`")
        with torch.inference_mode(False), evaluating(model, fitting=True):
            tensors = self.fit_tensors(model, loader, None)
        self._set(_on_cpu(tensors), weights_fingerprint(model))
        return self

    def check_fitted(self, model: nn.Module) -> None:
        """Raise unless there is a state and it was fitted on the weights that ``model`` now has."""
        if self._tensors is None or self._fingerprint is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)`.")
        if not same_weights(self._fingerprint, weights_fingerprint(model), model):
            raise NotFittedError(
                f"{type(self).__name__} was fitted on other weights than this model has. Load the weights it was fitted "
                f"on ({self.uq_ckpt_path or 'its -uq.ckpt'}), or call `fit(model, loader)` again."
            )

    # ------------------------------------------------------------------ fitting under a Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what was not tested, and forget what was verified."""
        check_strategy(trainer, type(self).__name__)
        self._verified = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new fit clears the state; what would fail after training fails now."""
        self._set(None, None)
        self.uq_ckpt_path = None
        averaging = (WeightAveraging, StochasticWeightAveraging)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for later in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(later, averaging):
                raise InputError(
                    f"{type(self).__name__} stands before {type(later).__name__} in the Trainer's callbacks, so it would be "
                    "fitted on weights that are not yet averaged. Swap them."
                )
        loader = self._fitting_loader(trainer)
        check_loader(loader, "argument `dataloader`")
        self.try_fit(trainer, pl_module, loader)
        if self.weights == "best" and any(c.monitor for c in _model_checkpoints(trainer)):
            check_plain(dict(pl_module.hparams), f"the hyper-parameters of {type(pl_module).__name__}", _WHY_PLAIN)

    def try_fit(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        """Look at the first batch; eagerly, since nothing is compiled yet.

        Raises:
            InputError: There is none, or :meth:`check_batch` says so.
        """
        with evaluating(pl_module, trainer, fitting=True), torch.compiler.set_stance("force_eager"):
            for batch in exact_loader(loader, name="argument `dataloader`", limit=1):
                self.check_batch(pl_module, to_device(batch, pl_module, trainer), trainer)
                return
        raise InputError(f"Expected {type(self).__name__}'s fitting data to hold samples, but it is empty.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit while the strategy still stands: in ``on_fit_end`` the module is already back on the CPU."""
        loader = self._fitting_loader(trainer)
        best = self._best_path(trainer)
        with self._weights_of(best, trainer, pl_module):
            self._fit(trainer, pl_module, loader)
        self._known_loader = loader
        self._write(best, trainer, pl_module)
        self._verified = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An interrupted fit leaves nothing fitted, and an interrupted prediction nothing wrapped."""
        unpatch(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._set(None, None)

    def _fitting_loader(self, trainer: Trainer) -> Any:
        return self.default_loader(trainer) if self.dataloader is None else self.dataloader

    def _fit(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        limit = None if self.dataloader is not None else self.loader_limit(trainer)
        self._set(None, None)
        with torch.inference_mode(False), unpatched(pl_module), evaluating(pl_module, trainer, fitting=True):
            exact = exact_loader(loader, trainer, name="argument `dataloader`", limit=limit)
            tensors = self.fit_tensors(pl_module, exact, trainer)
            fingerprint = weights_fingerprint(pl_module)
        self._set(_on_cpu(tensors), fingerprint)

    def _best_path(self, trainer: Trainer) -> str | None:
        finish_writing(trainer.strategy)
        paths = [
            callback.best_model_path
            for callback in _model_checkpoints(trainer)
            if callback.monitor is not None and callback.best_model_path
        ]
        # Rank 0 wrote the file, and another rank may not see it yet: rank 0 says whether it is there.
        path = next((path for path in paths if Path(path).is_file()), None) if self.weights == "best" else None
        best: str | None = trainer.strategy.broadcast(path)
        return best

    @contextmanager
    def _weights_of(self, best: str | None, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """The weights to fit on, in the module; what was there before is put back."""
        before = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        try:
            if best is not None:
                checkpoint = _read_back(best, trainer)
                pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
            elif trainer.world_size > 1:
                # BatchNorm's means differ by rank, and tests run with rank 0's.
                for buffer in pl_module.buffers():
                    torch.distributed.broadcast(buffer, 0)
            yield
        finally:
            pl_module.load_state_dict(before, strict=pl_module.strict_loading)

    def _write(self, best: str | None, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``<best>-uq.ckpt`` or ``uq-last.ckpt``: the weights fitted on, and the states of all our callbacks."""
        others = [c for c in trainer.callbacks if isinstance(c, PostTrainingCallback)]  # type: ignore[attr-defined]
        states = {c.state_key: c.state_dict() for c in others if c.fitted and c._fits_same_weights(self)}
        if best is not None:
            path = Path(best).with_name(f"{Path(best).stem}-uq.ckpt")
            checkpoint = _read_back(best, trainer)
        else:
            path_or_none = self._last_path(trainer, others)
            if path_or_none is None:
                rank_zero_info(f"{type(self).__name__} wrote no file: no ModelCheckpoint has a directory.")
                return
            path = path_or_none
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            # An averaging callback has put its own last average there; it is what the module holds in any case.
            checkpoint["state_dict"] = pl_module.state_dict()
        known = {c.state_key for c in others}  # those fitted on other weights have no place here
        kept = {key: state for key, state in (checkpoint.get("callbacks") or {}).items() if key not in known}
        checkpoint["callbacks"] = {**kept, **states}
        class_path = f"{type(pl_module).__module__}.{type(pl_module).__qualname__}"
        checkpoint[WRITTEN_BY] = {"class_path": class_path, "is_ours": is_uncertainty_module(pl_module)}
        write_checkpoint(trainer.strategy, checkpoint, path)
        self.uq_ckpt_path = str(path)

    def _fits_same_weights(self, other: "PostTrainingCallback") -> bool:
        return (
            self._fingerprint is not None
            and other._fingerprint is not None
            and torch.equal(self._fingerprint, other._fingerprint)
        )

    def _last_path(self, trainer: Trainer, others: list["PostTrainingCallback"]) -> Path | None:
        checkpoints = [c for c in _model_checkpoints(trainer) if c.dirpath]
        if not checkpoints or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        directory = Path(trainer.strategy.broadcast(str(checkpoints[0].dirpath)))
        # Not "last-uq.ckpt": Lightning would take any name that begins with "last" for the one to resume from.
        written = [c.uq_ckpt_path for c in others]
        candidates = ["uq-last.ckpt", *(f"uq-last-v{i}.ckpt" for i in range(1, 1000))]
        free = (directory / n for n in candidates if str(directory / n) in written or not (directory / n).exists())
        chosen: Path = trainer.strategy.broadcast(next(free))
        return chosen

    # ------------------------------------------------------------------ the weights in memory are the fitted ones

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Verify at the first batch of ``trainer.validate``, after any swap of weights."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._verify(trainer, pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Verify at the first batch of ``trainer.test``."""
        self._verify(trainer, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Verify at the first batch of ``trainer.predict``."""
        self._verify(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let predictions carry what was fitted: those of our modules, and with ``attach`` of any."""
        if is_uncertainty_module(pl_module):
            patch(pl_module, "predict_step", lambda inner: _Predict(self, pl_module, inner))
        elif self.attach:
            patch(pl_module, "predict_step", lambda inner: _Predict(self, pl_module, inner, self._predict_foreign))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the module's own ``predict_step`` back."""
        unpatch(pl_module)

    def _predict_foreign(self, pl_module: LightningModule, batch: Any) -> Prediction:
        return CategoricalPrediction(self.logits(pl_module, batch, pl_module.trainer))

    def _verify(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """State in memory, else a sibling file, else a refit, else an error: rank 0 decides for all."""
        if self._verified:
            return
        found: tuple[str, Any] | None = None
        if trainer.is_global_zero:
            current = weights_fingerprint(pl_module)
            matches = self._fingerprint is not None and same_weights(self._fingerprint, current, pl_module)
            found = ("memory", None) if matches else self._look_up(trainer, pl_module, current)
        found = trainer.strategy.broadcast(found)
        assert found is not None
        kind, payload = found
        if kind == "error":
            raise NotFittedError(payload)
        if kind == "file":
            path, state = payload
            self.load_state_dict(state)
            self.uq_ckpt_path = path
            rank_zero_info(f"{type(self).__name__} took its fitted state from {path}.")
        elif kind == "memory":
            # Under spawn, or with one rank restored, another rank may hold nothing: rank 0's state is everybody's.
            if trainer.world_size > 1:
                self.load_state_dict(trainer.strategy.broadcast(self.state_dict()))
        else:
            name = type(self).__name__
            if self._fingerprint is None:
                rank_zero_info(f"{name} is fitted now, from argument `dataloader`, on the weights in memory.")
            else:
                rank_zero_warn(
                    f"{name} was fitted on other weights than are now in memory; it is fitted again, from the same loader. To "
                    "use the weights it was fitted on, pass `ckpt_path`."
                )
            self._fit(trainer, pl_module, self._loader_for_refit())
        self._verified = True

    def _loader_for_refit(self) -> Any:
        return self._known_loader if self.dataloader is None else self.dataloader

    def _look_up(self, trainer: Trainer, pl_module: LightningModule, current: Tensor) -> tuple[str, Any]:
        tested = trainer.ckpt_path
        refusal: str | None = None
        siblings = [self.uq_ckpt_path]
        if tested is not None:
            siblings.insert(0, str(Path(tested).with_name(f"{Path(tested).stem}-uq.ckpt")))
        for path in siblings:
            if path is not None and Path(path).is_file():
                try:
                    states = read_checkpoint(path, "the -uq.ckpt to be a checkpoint").get("callbacks") or {}
                except InputError as error:  # told to the other ranks, too, by the caller
                    refusal = str(error)
                    continue
                state: Any = states.get(self.state_key)
                if not _is_state(state) or state["fingerprint"] is None:
                    continue
                if same_weights(state["fingerprint"], current, pl_module):
                    refusal = self._refusal(state)
                    if refusal is None:
                        return "file", (path, state)
        if tested is not None and _is_raw_model(str(tested), pl_module):
            return "error", (
                f"The weights in memory are not those of {tested} but the raw ones that it keeps beside the average: the "
                "averaging callback of this Trainer put them there. Use a Trainer without the averaging callback."
            )
        if self._loader_for_refit() is not None:
            return "refit", None
        if refusal is not None:
            return "error", refusal
        return "error", (
            f"{type(self).__name__} has no state that was fitted on the weights in memory"
            + (f", and there is none beside {tested}" if tested is not None else "")
            + ". Pass `ckpt_path=` the -uq.ckpt that the fit wrote, or `dataloader=` so that it can be fitted now."
        )


def _on_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in tensors.items()}


class _Predict:
    """A ``predict_step`` whose predictions carry what a callback fitted."""

    def __init__(
        self,
        callback: PostTrainingCallback,
        model: LightningModule,
        inner: Callable[..., Any],
        foreign: Callable[[LightningModule, Any], Prediction] | None = None,
    ) -> None:
        self.callback = callback
        self.model = model
        # The first of our callbacks replaces the predict_step of a module that is not ours; the next build on it.
        self.make = inner if foreign is None or isinstance(inner, _Predict) else partial(_ignoring_rest, foreign, model)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Prediction:
        with self.callback.attaching(self.model) as attach:
            prediction = self.make(batch, *args, **kwargs)
        return attach(prediction)


def _ignoring_rest(
    function: Callable[..., Prediction], model: LightningModule, batch: Any, *_: Any, **__: Any
) -> Prediction:
    return function(model, batch)


def patch(module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of one instance until :func:`unpatch`; ``wrap`` gets what it was, perhaps patched already."""
    patched = module.__dict__.setdefault("_lightning_uq_patched", {})
    patched.setdefault(name, module.__dict__.get(name))
    module.__dict__[name] = wrap(getattr(module, name))


def unpatch(module: nn.Module) -> None:
    """Put back every method that :func:`patch` replaced."""
    for name, own in module.__dict__.pop("_lightning_uq_patched", {}).items():
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own


@contextmanager
def unpatched(module: nn.Module) -> Iterator[None]:
    """The module as it was before :func:`patch`, for the time of a fit: what is fitted must not see its own result."""
    held = {name: module.__dict__.pop(name) for name in module.__dict__.get("_lightning_uq_patched", {})}
    module.__dict__.update({n: own for n, own in module.__dict__.get("_lightning_uq_patched", {}).items() if own})
    try:
        yield
    finally:
        module.__dict__.update(held)


def _is_state(state: Any) -> bool:
    keys = {"version", "settings", "tensors", "fingerprint"}
    return isinstance(state, dict) and set(state) == keys and state["version"] == 1


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _read_back(path: str, trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that this training wrote."""
    with reading(path, "the best checkpoint to hold weights and plain data"):
        checkpoint: dict[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    return checkpoint


def _is_raw_model(path: str, pl_module: LightningModule) -> bool:
    """Whether the module holds the raw weights of a checkpoint whose ``state_dict`` is an average."""
    if not Path(path).is_file():
        return False
    try:
        raw = read_checkpoint(path).get("current_model_state")
    except InputError:  # it was loaded with `weights_only=False`; this only looks for the reason of a mismatch
        return False
    if raw is None:
        return False
    held = pl_module.state_dict()
    return all(
        name in held and torch.equal(held[name].cpu(), value.to(held[name].dtype)) for name, value in raw.items()
    )


def fitted_states(path: str | Path) -> dict[str, dict[str, Any]]:
    """The fitted states that a ``-uq.ckpt`` holds, by key.

    Raises:
        InputError: The file is no checkpoint, or holds none.
    """
    callbacks = read_checkpoint(path).get("callbacks") or {}
    found = {key: state for key, state in callbacks.items() if _is_state(state)}
    if not found:
        raise InputError(f"Expected argument `path` to hold the state of a fitted callback, but {path} holds none.")
    return found
