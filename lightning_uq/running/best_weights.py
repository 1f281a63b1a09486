"""The weights that a callback fits on: those of the best checkpoint, or the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq.checkpoint_files import finish_writing, reading
from lightning_uq.lightning_trees import is_instance


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The Trainer's ModelCheckpoint callbacks."""
    return [one for one in trainer.callbacks if is_instance(one, ModelCheckpoint)]  # type: ignore[attr-defined]


def best_checkpoint(trainer: Trainer) -> str | None:
    """Path of the best checkpoint of a ModelCheckpoint with a monitor, or None where none was saved. A collective."""
    finish_writing(trainer.strategy)
    paths = [one.best_model_path for one in model_checkpoints(trainer) if one.monitor is not None]
    # Rank 0 wrote the file, and another rank may not see it yet: rank 0 says whether it is there.
    path: str | None = trainer.strategy.broadcast(next((p for p in paths if p and Path(p).is_file()), None))
    return path


def read_back(path: str, trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that this training wrote.

    Raises:
        InputError: It cannot be read as weights and plain data.
    """
    with reading(path, "The best checkpoint must hold weights and plain data"):
        checkpoint: dict[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=True)
    return checkpoint


@contextmanager
def weights_of(path: str | None, trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The weights of a checkpoint, or the last ones of rank 0, in the module; afterwards it has its own again."""
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    try:
        if path is not None:
            checkpoint = read_back(path, trainer)
            module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        elif trainer.world_size > 1:
            # BatchNorm's means differ by rank, and tests run with rank 0's.
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)
        yield
    finally:
        module.load_state_dict(before, strict=module.strict_loading)
