"""The file ``-uq.ckpt``: a checkpoint's weights and the states fitted on them. A training writes it beside its best checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_uq._lightning import dump_checkpoint
from lightning_uq.checkpoint_files import beside, in_folder, is_file, plain_part, read_checkpoint, write_checkpoint
from lightning_uq.errors import InputError
from lightning_uq.networks.sharding import is_sharded, whole_state_dict
from lightning_uq.running.best_weights import model_checkpoints, read_back
from lightning_uq.running.fitted_state import FittedState, holds_fit
from lightning_uq.running.logits import is_uncertainty_module

WRITTEN_BY = "lightning_uq_written_by"
"""Key in a ``-uq.ckpt``: the class of the module that its states were fitted on, as plain data."""

LEFT_OUT = "lightning_uq_left_out"
"""Key in a ``-uq.ckpt``: the names of entries of the training checkpoint that are not plain data and are missing here."""

_HYPER_PARAMETERS = f"{LightningModule.CHECKPOINT_HYPER_PARAMS_KEY}."


def sibling_path(path: str | Path) -> str:
    """The path of a checkpoint's sibling."""
    return beside(path, f"{Path(path).stem}-uq.ckpt")


def write_sibling(
    best: str | None,
    states: Mapping[str, FittedState | None],
    written: Iterable[str | None],
    trainer: Trainer,
    module: LightningModule,
) -> str | None:
    """Write the fitted weights together with the fitted states, as plain data. A collective.

    Args:
        best: The checkpoint whose weights the module has now, and whose sibling is written; None writes the last weights to ``uq-last.ckpt``.
        states: State by callback key; None for a callback that was not fitted on these weights.
        written: Files that this training's callbacks wrote and may replace.
        trainer: The Trainer of the fit.
        module: The module of the fit.

    Returns:
        Path of the file, or None if no ModelCheckpoint has a directory.
    """
    written = set(written)
    path = sibling_path(best) if best is not None else _path_of_last(trainer, written)
    if path is None:
        return None
    content = read_back(best, trainer) if best is not None else _last(trainer)
    if is_sharded(module):
        # One file with the whole weights can be read on any number of ranks. Rank 0 alone gets them.
        content["state_dict"] = whole_state_dict(module)
        if best is None or not is_file(best):
            content.pop("optimizer_states", None)  # this rank's shards
    checkpoint = with_states(content, states, module)
    if path not in written:
        report_left_out(path, checkpoint)
    write_checkpoint(trainer.strategy, checkpoint, path)
    return path


def with_states(
    checkpoint: Mapping[str, Any], states: Mapping[str, FittedState | None], module: nn.Module
) -> dict[str, Any]:
    """The content of a ``-uq.ckpt``: the plain data of a checkpoint, the fitted states, and the class of the module.

    Args:
        checkpoint: The checkpoint.
        states: State by callback key; None for a callback whose state the checkpoint must not hold.
        module: The module of the fit.
    """
    content, left_out = plain_part(checkpoint)
    kept = {key: state for key, state in (content.get("callbacks") or {}).items() if key not in states}
    content["callbacks"] = kept | {key: state.to_dict() for key, state in states.items() if state is not None}
    class_path = f"{type(module).__module__}.{type(module).__qualname__}"
    content[WRITTEN_BY] = {"class_path": class_path, "is_ours": is_uncertainty_module(module)}
    if (kind := LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE) in left_out:
        left_out.remove(kind)
        content[kind] = "AttributeDict"  # Lightning replaces this name by its own class for hyper-parameters
    if left_out:
        content[LEFT_OUT] = left_out
    return content


def report_left_out(path: str, content: Mapping[str, Any]) -> None:
    """Log the entries that a ``-uq.ckpt`` leaves out, if any."""
    left_out = content.get(LEFT_OUT)
    if not left_out:
        return
    again = (
        " Pass these hyper-parameters again to `load_from_checkpoint`, or the whole module to `load_fitted`."
        if any(name.startswith(_HYPER_PARAMETERS) for name in left_out)
        else ""
    )
    rank_zero_info(
        f"{path} leaves out {', '.join(left_out)}, because a checkpoint for `weights_only=True` can hold only plain "
        f"data.{again}"
    )


def _last(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint of the module's current weights."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    held = _HeldWeights()
    callbacks.append(held)
    try:
        return dump_checkpoint(trainer)
    finally:
        callbacks.remove(held)


class _HeldWeights(Callback):
    """Makes a checkpoint hold the module's own weights, where an averaging callback has put its last average."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called after the other callbacks, and before the module's own hook, which may rename or drop weights."""
        checkpoint["state_dict"] = pl_module.state_dict()


def _path_of_last(trainer: Trainer, written: set[str | None]) -> str | None:
    checkpoints = [one for one in model_checkpoints(trainer) if one.dirpath]
    if not checkpoints or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    free = None
    if trainer.is_global_zero:
        # Not "last-uq.ckpt", since Lightning resumes from files whose names begin with "last".
        names = ["uq-last.ckpt", *(f"uq-last-v{i}.ckpt" for i in range(1, 1000))]
        paths = (in_folder(str(checkpoints[0].dirpath), name) for name in names)
        free = next(path for path in paths if path in written or not is_file(path))
    chosen: str | None = trainer.strategy.broadcast(free)
    return chosen


def check_complete(path: str | Path, checkpoint: Mapping[str, Any], given: Iterable[str], advice: str) -> None:
    """Raise an :class:`InputError` if a ``-uq.ckpt`` lacks hyper-parameters that are not given.

    Otherwise their defaults would be used, and weights do not show, for example, the activation function.
    """
    left_out = [name for name in checkpoint.get(LEFT_OUT, ()) if name.startswith(_HYPER_PARAMETERS)]
    lacking = [name for name in (name.removeprefix(_HYPER_PARAMETERS) for name in left_out) if name not in given]
    if lacking:
        raise InputError(f"{path} lacks the hyper-parameters {', '.join(lacking)}, which are not plain data. {advice}")


def fitted_states(path: str | Path) -> dict[str, dict[str, Any]]:
    """The fitted states in a ``-uq.ckpt``, by key.

    Raises:
        InputError: The file is not a checkpoint, has no fitted state, or has one of a newer release.
    """
    callbacks = read_checkpoint(path).get("callbacks") or {}
    found = {
        key: FittedState.read(state, f"The state of {key} in {path}")
        for key, state in callbacks.items()
        if holds_fit(state)
    }
    states = {key: state.to_dict() for key, state in found.items() if state is not None}
    if not states:
        raise InputError(
            f"{path} holds no state of a fitted callback. A training with such callbacks writes a file with their states beside the best checkpoint. Without "
            "a training, `save_fitted` does."
        )
    return states
