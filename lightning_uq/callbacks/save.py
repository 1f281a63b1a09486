"""Saves fits made without a Trainer to the same ``-uq.ckpt`` that a Trainer's fit writes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_uq._lightning import is_local_path
from lightning_uq.callbacks.fitting import FittingCallback
from lightning_uq.callbacks.held_out_order import check_read
from lightning_uq.callbacks.sibling import WRITTEN_BY, report_left_out, with_states
from lightning_uq.checkpoint_files import (
    LIGHTNING_VERSION,
    hyperparameter_entries,
    is_file,
    read_checkpoint,
    write_checkpoint,
)
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.fingerprint import weights_fingerprint
from lightning_uq.networks.graph_files import check_columns
from lightning_uq.running.ranks import ProcessGroup, raising_on_all_ranks
from lightning_uq.running.transforms import transforms_of

COLUMNS = "lightning_uq_columns"
"""Key in a ``-uq.ckpt``: the names of the table columns that form the model's input, in order."""


def save_fitted(
    path: str | Path, model: nn.Module, callbacks: Sequence[FittingCallback], *, columns: Sequence[str] | None = None
) -> None:
    """Write a model's weights and the states of its fitted callbacks to one file, which :func:`load_fitted` loads as a plain module.

    Use it for a model that is already trained: ``callback.fit(model, loader)`` needs no Trainer and writes no file. The file is
    equivalent to the ``-uq.ckpt`` of a Trainer's fit: ``Trainer(callbacks=...).test(model, ckpt_path=path)`` reads the states
    from it, and ``load_from_checkpoint`` the weights. It cannot resume a training, since it has no optimizer state.

    The file holds only plain data and loads with ``weights_only=True``. It is written atomically. Afterwards, the ``uq_ckpt_path`` of
    each callback names it. The order of ``callbacks`` does not matter, since each state records which other fits it read. If, for
    example, :class:`ConformalSets` were fitted to calibrated predictions, pass the calibration too. A module of this package shows each fit the results of the earlier ones. For any other module, name them:
    ``ConformalSets().fit(model, loader, after=[temperature])``.

    If ``torch.distributed`` is initialized, all processes must call this function: the first one writes, the others wait for
    it, and all raise if one fails. Without a process group, call it in one process only.

    Args:
        path: The file, local or on a file system that fsspec supports. An existing file is replaced only if it is of this kind.
        model: The model: a module of this package, any LightningModule, or a plain ``nn.Module``.
        callbacks: The fitted callbacks, one or more. Callbacks without a fit to weights, such as :class:`OODDetection`, have no state.
        columns: Names of the table columns that form the model's input [B, D], in order. ``lightning-uq score`` then finds the columns by
            name, in any order; without names it uses them by position.

    Raises:
        InputError: ``path`` cannot be written, is a file of another kind, or has a name from which Lightning would resume; an
            argument has another type; two callbacks have the same key; a callback was fitted without the result of another, or to the result of
            a missing one.
        NotFittedError: A callback is not fitted, or was fitted on other weights, or only to predictions.

    Example:
        >>> import tempfile
        >>> from lightning_uq import TemperatureScaling, load_fitted
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(2, 2), torch.randn(64, 2)
        >>> y = torch.distributions.Categorical(logits=model(x)).sample()
        >>> temperature = TemperatureScaling().fit(model, [(x, y)])
        >>> path = Path(tempfile.mkdtemp()) / "model-uq.ckpt"
        >>> save_fitted(path, model, [temperature])
        >>> load_fitted(path, nn.Linear(2, 2))(x)["probs"].shape
        torch.Size([64, 2])
    """
    ranks = ProcessGroup()
    with raising_on_all_ranks(ranks):
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"`path` must be the path of a file, but its type is {type(path).__name__}.")
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` must be a torch.nn.Module, but its type is {type(model).__name__}.")
        model = getattr(model, "_orig_mod", model)  # unwraps `torch.compile`
        _check_callbacks(callbacks, model)
        check_read(callbacks)
        states = {one.state_key: one._state for one in callbacks}
        content = with_states(_checkpoint_of(model), states, model)
        if names := check_columns(columns):
            content[COLUMNS] = names
    path = str(path)
    with raising_on_all_ranks(ranks):
        if ranks.rank == 0:
            _check_path(path)
            write_checkpoint(SingleDeviceStrategy("cpu"), content, path)
            report_left_out(path, content)
    transforms = transforms_of(model)
    for one in callbacks:
        one.uq_ckpt_path = path
        if transforms is not None:
            transforms.note_path(one.state_key, path)


def _check_callbacks(callbacks: Sequence[FittingCallback], model: nn.Module) -> None:
    if not isinstance(callbacks, list | tuple) or not callbacks:
        came = "empty" if isinstance(callbacks, list | tuple) else f"a {type(callbacks).__name__}"
        raise InputError(f"`callbacks` must be a list of fitted callbacks, but it is {came}.")
    current = weights_fingerprint(model)
    keys: set[str] = set()
    for one in callbacks:
        name = type(one).__name__
        if not isinstance(one, FittingCallback):
            raise InputError(
                f"`callbacks` must be callbacks that fit something to a model's weights, but {name} has no such state. Leave it out."
            )
        if one.state_key in keys:
            raise InputError(
                f"`callbacks` holds two callbacks with the key {one.state_key!r}. Pass a `name=` to one of them, and fit it again."
            )
        keys.add(one.state_key)
        if not one.fitted:
            raise NotFittedError(f"{one.state_key} is not fitted. Call `fit(model, loader)` first.")
        if one._fingerprint is None:
            raise NotFittedError(
                f"{one.state_key} was fitted to predictions in memory, so its weights are unknown. Call `fit(model, loader)` instead."
            )
        if not torch.equal(one._fingerprint, current):  # exact, since the file gets these weights
            raise NotFittedError(
                f"{one.state_key} was fitted on other weights than those of `model`, or before their precision changed. Call `fit(model, loader)` "
                "again."
            )


def _check_path(path: str) -> None:
    name = Path(path).name
    if name.startswith("last") and name.endswith(".ckpt"):
        raise InputError(
            f"`path` must not begin with `last`, since Lightning would resume from a file named {name}. Use a name such as "
            f"{name.replace('last', 'model', 1)}."
        )
    if is_local_path(path):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(
                f"`path` must be in an existing directory, but {Path(path).parent} does not exist. Create it first."
            )
        if Path(path).is_dir():
            raise InputError(f"`path` must be a file, but {path} is a directory.")
    if is_file(path) and WRITTEN_BY not in read_checkpoint(path, "`path` must not exist, or be a file of this kind"):
        raise InputError(f"`path` is {path}, a training checkpoint, which would be overwritten. Choose another name.")


def _checkpoint_of(model: nn.Module) -> dict[str, Any]:
    """The checkpoint of a model's weights that Lightning would write, without the parts that need a Trainer."""
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        LIGHTNING_VERSION: lightning.__version__,
        "state_dict": model.state_dict(),
    }
    if is_instance(model, LightningModule):
        checkpoint |= {"epoch": model.current_epoch, "global_step": model.global_step, **hyperparameter_entries(model)}
        try:
            model.on_save_checkpoint(checkpoint)
        except Exception as error:
            raise InputError(
                f"`on_save_checkpoint` of {type(model).__name__} failed without a Trainer ({type(error).__name__}: {error}). Make it "
                "work without one."
            ) from error
    return checkpoint
