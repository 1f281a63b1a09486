"""The sibling file ``<best>-uq.ckpt`` of a checkpoint: its weights, and what was fitted on them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_uq._lightning import dump_checkpoint
from lightning_uq.checkpoint_files import read_checkpoint, write_checkpoint
from lightning_uq.errors import InputError
from lightning_uq.running.best_weights import model_checkpoints, read_back
from lightning_uq.running.fitted_state import FittedState
from lightning_uq.running.logits import is_uncertainty_module

WRITTEN_BY = "lightning_uq_written_by"
"""Key in a ``-uq.ckpt``: the LightningModule that its states were fitted on, as plain data."""


def sibling_path(path: str | Path) -> Path:
    """Path of a checkpoint's sibling."""
    return Path(path).with_name(f"{Path(path).stem}-uq.ckpt")


def write_sibling(
    best: str | None,
    states: Mapping[str, FittedState | None],
    written: Iterable[str | None],
    trainer: Trainer,
    module: LightningModule,
) -> str | None:
    """Write the weights that were fitted on together with the fitted states. A collective.

    Args:
        best: The checkpoint whose weights they are, whose sibling is written; None for the last weights, ``uq-last.ckpt``.
        states: State by callback key; None for a callback that was not fitted on these weights.
        written: Files that this training's callbacks have written, and may replace.
        trainer: The Trainer of the fit.
        module: The module that was fitted on.

    Returns:
        Path of the file, or None if no ModelCheckpoint has a directory.
    """
    if best is not None:
        path: Path | None = sibling_path(best)
        checkpoint = read_back(best, trainer)
    else:
        path = _path_of_last(trainer, written)
        if path is None:
            return None
        checkpoint = dump_checkpoint(trainer)
        # An averaging callback has put its own last average there; it is what the module holds in any case.
        checkpoint["state_dict"] = module.state_dict()
    kept = {key: state for key, state in (checkpoint.get("callbacks") or {}).items() if key not in states}
    checkpoint["callbacks"] = kept | {key: state.to_dict() for key, state in states.items() if state is not None}
    class_path = f"{type(module).__module__}.{type(module).__qualname__}"
    checkpoint[WRITTEN_BY] = {"class_path": class_path, "is_ours": is_uncertainty_module(module)}
    assert path is not None
    write_checkpoint(trainer.strategy, checkpoint, path)
    return str(path)


def _path_of_last(trainer: Trainer, written: Iterable[str | None]) -> Path | None:
    checkpoints = [one for one in model_checkpoints(trainer) if one.dirpath]
    if not checkpoints or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    directory = Path(trainer.strategy.broadcast(str(checkpoints[0].dirpath)))
    replaceable = set(written)
    # Not "last-uq.ckpt": Lightning would take any name that begins with "last" for the one to resume from.
    candidates = ["uq-last.ckpt", *(f"uq-last-v{i}.ckpt" for i in range(1, 1000))]
    free = (directory / n for n in candidates if str(directory / n) in replaceable or not (directory / n).exists())
    chosen: Path = trainer.strategy.broadcast(next(free))
    return chosen


def fitted_states(path: str | Path) -> dict[str, dict[str, Any]]:
    """The fitted states that a ``-uq.ckpt`` holds, by key.

    Raises:
        InputError: The file is no checkpoint, or holds none.
    """
    callbacks = read_checkpoint(path).get("callbacks") or {}
    found = {key: state for key, state in callbacks.items() if FittedState.read(state) is not None}
    if not found:
        raise InputError(f"{path} holds no state of a fitted callback.")
    return found
