"""The weights that a callback fits on: those of the best checkpoint, or the last ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uq.checkpoint_files import SHARDED_METADATA, finish_writing, in_folder, is_checkpoint, is_file, reading
from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.sharding import is_sharded, sharded
from lightning_uq.running.kept import run_revocably, tensors_put_back


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The Trainer's ModelCheckpoint callbacks."""
    return [one for one in trainer.callbacks if is_instance(one, ModelCheckpoint)]  # type: ignore[attr-defined]


def _monitored(trainer: Trainer) -> list[ModelCheckpoint]:
    return [one for one in model_checkpoints(trainer) if one.monitor is not None]


class BestCheckpoint:
    """The best checkpoint of one fit.

    A ModelCheckpoint used for several fits keeps the path and the score of an earlier one, and writes no file until a later
    fit beats that score. Its path therefore counts only if this fit wrote it, or if it came with a resumed training.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, str] = {}  # paths from a resumed training, by key of the ModelCheckpoint
        self._earlier: dict[str, tuple[str, float | None]] = {}  # paths and scores of earlier fits

    def note_resumed(self, checkpoint: Mapping[str, Any]) -> None:
        """Note the best checkpoints of the training that a fit resumes.

        Lightning's tuners also restore a checkpoint, from before the first step, but its paths do not belong to this training.
        """
        states = (checkpoint.get("callbacks") or {}) if checkpoint.get("global_step") else {}
        self._resumed = {key: state["best_model_path"] for key, state in states.items() if "best_model_path" in state}

    def start(self, trainer: Trainer, who: str, *, is_required: bool) -> None:
        """Note at the start of a fit which files earlier fits wrote.

        Args:
            trainer: The Trainer of the fit.
            who: Name of the callback, for messages.
            is_required: Whether there must be a best checkpoint.

        Raises:
            InputError: A best checkpoint is required, but no ModelCheckpoint has a monitor.
        """
        if is_required and not _monitored(trainer):
            raise InputError(
                f"{who} has `weights='best'`, but no ModelCheckpoint of the Trainer has a `monitor`. Add "
                "`ModelCheckpoint(monitor=...)`, or use `weights='last'`."
            )
        held = {one.state_key: _path_and_score(one) for one in _monitored(trainer)}
        self._earlier = {key: pair for key, pair in held.items() if pair[0] != self._resumed.get(key)}
        self._resumed = {}

    def find(self, trainer: Trainer, who: str, *, is_required: bool) -> str | None:
        """The path of the best checkpoint at the end of the fit. If it is lost, None and a warning. A collective.

        Args:
            trainer: The Trainer of the fit.
            who: Name of the callback, for messages.
            is_required: Whether there must be a best checkpoint.

        Raises:
            InputError: A best checkpoint is required, but there is none.
        """
        finish_writing(trainer.strategy)
        # Rank 0 wrote the file, and another rank may not see it yet.
        found = self._look(trainer) if trainer.is_global_zero else (None, None)
        path, problem = trainer.strategy.broadcast(found)
        if path is not None:
            return str(path)
        if is_required and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which saves no checkpoint
            reason = problem or "no ModelCheckpoint with a `monitor` has saved a file"
            raise InputError(
                f"{who} has `weights='best'`, but {reason}. Use `weights='last'` to fit on the last weights."
            )
        if problem is not None:
            rank_zero_warn(f"{who} is fitted on the last weights: {problem}.")
        return None

    def _look(self, trainer: Trainer) -> tuple[str | None, str | None]:
        """The path, or the reason why it is lost; both None if nothing was saved."""
        monitored = _monitored(trainer)
        saved = [one for one in monitored if one.best_model_path]
        own = [one for one in saved if self._earlier.get(one.state_key) != _path_and_score(one)]
        if own:
            path = own[0].best_model_path
            if not is_checkpoint(path):
                return None, f"the best checkpoint {path} no longer exists"
            _report_choice(own[0], monitored, trainer)
            return path, None
        if saved:
            return None, (
                f"the ModelCheckpoint holds {saved[0].best_model_path} of an earlier fit, and this fit did not reach a better "
                f"{saved[0].monitor}. Use a new ModelCheckpoint for each fit"
            )
        return None, None


def _path_and_score(one: ModelCheckpoint) -> tuple[str, float | None]:
    return one.best_model_path, None if one.best_model_score is None else float(one.best_model_score)


def _report_choice(chosen: ModelCheckpoint, among: Sequence[ModelCheckpoint], trainer: Trainer) -> None:
    others = sorted({str(one.monitor) for one in among if (one.monitor, one.mode) != (chosen.monitor, chosen.mode)})
    if others:
        report_guess(
            f"Callbacks are fitted on the best weights by {chosen.monitor}, the monitor of the first ModelCheckpoint that "
            f"saved a file, rather than by {', '.join(others)}. To use another monitor, put its ModelCheckpoint first.",
            trainer,
        )


def read_back(path: str, trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that this training wrote. A sharded one lacks the weights and the optimizers.

    A file in the directory of the Trainer's own ModelCheckpoint is trusted, since it is the user's own, and may hold any object, such as
    a network among the hyper-parameters. A ``best_model_path`` elsewhere came with a resumed checkpoint, and must hold plain data.

    Raises:
        InputError: The file cannot be read.
    """
    strategy = trainer.strategy
    file = path if is_file(path) else in_folder(path, SHARDED_METADATA)
    # `ModelParallelStrategy.load_checkpoint` loads the weights into the module.
    source = strategy.checkpoint_io if is_instance(strategy, ModelParallelStrategy) else strategy
    return _read(path, trainer, lambda trust: source.load_checkpoint(file, weights_only=not trust))


def _load_sharded(path: str, trainer: Trainer) -> dict[str, Any]:
    """Load the weights of a checkpoint into the sharded module, as Lightning does, and return its other entries. A collective."""
    strategy = trainer.strategy
    optimizers, strategy.optimizers = strategy.optimizers, []  # whose states it would load too
    try:
        return _read(path, trainer, lambda trust: strategy.load_checkpoint(path, weights_only=not trust))
    finally:
        strategy.optimizers = optimizers


def _read(path: str, trainer: Trainer, read: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
    is_own = any(one.dirpath and _is_below(path, str(one.dirpath)) for one in model_checkpoints(trainer))
    try:
        with reading(path, "The best checkpoint must hold weights and plain data"):
            return read(False)
    except InputError:
        if not is_own:
            raise
        with reading(path, "The best checkpoint must be readable"):
            return read(True)


def _is_below(path: str, directory: str) -> bool:
    return Path(directory) in Path(path).parents


@contextmanager
def weights_of(path: str | None, trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The module with the weights of a checkpoint, or the last ones of rank 0; the module is restored afterwards.

    They are loaded like in ``trainer.validate(ckpt_path=path)``, through the module's ``on_load_checkpoint``.
    """
    if path is not None:
        with sharded(module), tensors_put_back([*module.parameters(), *module.buffers()]):
            checkpoint = _load_sharded(path, trainer) if is_sharded(module) else read_back(path, trainer)
            revoke = run_revocably(module, lambda: _load(checkpoint, trainer, module))
            try:
                yield
            finally:
                revoke()
        return
    with tensors_put_back(module.buffers()):  # a forward pass may change buffers, but not parameters
        if trainer.world_size > 1:
            # BatchNorm's means differ between ranks, and tests run with rank 0's.
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)
        yield


def _load(checkpoint: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    function = trainer.state.fn
    try:
        trainer.state.fn = TrainerFn.VALIDATING  # since no training is resumed
        module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    finally:
        trainer.state.fn = function
