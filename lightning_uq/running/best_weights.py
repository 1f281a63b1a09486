"""The weights that a callback fits on: those of the best checkpoint, or the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_uq.checkpoint_files import finish_writing, is_file, reading
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.running.kept import run_revocably, tensors_put_back


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The Trainer's ModelCheckpoint callbacks."""
    return [one for one in trainer.callbacks if is_instance(one, ModelCheckpoint)]  # type: ignore[attr-defined]


def best_checkpoint(trainer: Trainer) -> str | None:
    """Path of the best checkpoint of a ModelCheckpoint with a monitor, or None where none was saved. A collective."""
    finish_writing(trainer.strategy)
    found = None
    if trainer.is_global_zero:  # it wrote the file, and another rank may not see it yet
        paths = [one.best_model_path for one in model_checkpoints(trainer) if one.monitor is not None]
        found = next((path for path in paths if path and is_file(path)), None)
    agreed: str | None = trainer.strategy.broadcast(found)
    return agreed


def read_back(path: str, trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that this training wrote.

    A file in the directory of the Trainer's own ModelCheckpoint may hold any object, such as a network among the
    hyper-parameters: it is the user's own. A ``best_model_path`` elsewhere came with a resumed checkpoint, and must hold plain data.

    Raises:
        InputError: It cannot be read.
    """
    is_own = any(one.dirpath and _is_below(path, str(one.dirpath)) for one in model_checkpoints(trainer))
    checkpoint: dict[str, Any]
    try:
        with reading(path, "The best checkpoint must hold weights and plain data"):
            checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    except InputError:
        if not is_own:
            raise
        with reading(path, "The best checkpoint must be readable"):
            checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
    return checkpoint


def _is_below(path: str, directory: str) -> bool:
    return Path(directory) in Path(path).parents


@contextmanager
def weights_of(path: str | None, trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The weights of a checkpoint, or the last ones of rank 0, in the module; afterwards it is as it was.

    They are loaded as ``trainer.validate(ckpt_path=path)`` loads them, through the module's ``on_load_checkpoint``.
    """
    with tensors_put_back(module):
        if path is not None:
            checkpoint = read_back(path, trainer)
            revoke = run_revocably(module, lambda: _load(checkpoint, trainer, module))
            try:
                yield
            finally:
                revoke()
            return
        if trainer.world_size > 1:
            # BatchNorm's means differ by rank, and tests run with rank 0's.
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)
        yield


def _load(checkpoint: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    function = trainer.state.fn
    try:
        trainer.state.fn = TrainerFn.VALIDATING  # no training is resumed
        module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    finally:
        trainer.state.fn = function
