"""Checkpoint files: only weights and plain data are read, and a file is written whole or not at all."""

import io
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_uq._lightning import hyperparameters_name, is_local_path
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.writing import replacing

_MUST = "`path` must name a checkpoint"

SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's directory that holds all but weights and optimizers."""

LIGHTNING_VERSION = "pytorch-lightning_version"
"""A key of every Lightning checkpoint. The weights may have another key than ``state_dict``, if a hook moved them."""

TRUST = "Pass `weights_only=False` if you trust the file."
"""The advice that ends an error about refused objects, for functions with the argument ``weights_only``."""


@contextmanager
def reading(path: str | Path, must: str = _MUST, if_refused: str = "") -> Iterator[None]:
    """Turn errors of the body into an :class:`InputError` that begins with ``must`` and names the file.

    It ends with ``if_refused`` if the file holds objects that ``weights_only=True`` refuses.
    """
    try:
        yield
    except Exception as error:  # a damaged file can raise any exception
        raise InputError(f"{must}, but {path} cannot be read: {_reason(error, if_refused)}") from error


def read_file(path: str | Path, must: str = _MUST, *, if_refused: str = "", weights_only: bool = True) -> Any:
    """Read a file of ``torch.save`` onto the CPU. Pickled code in it is refused, not run.

    Args:
        path: The file, on this machine or on a file system that fsspec knows.
        must: Start of the error message: what the file must be.
        if_refused: End of the error message about objects other than weights and plain data: what to do.
        weights_only: False also runs code that is pickled in the file.

    Raises:
        InputError: The file is missing or damaged, or holds objects other than weights and plain data.
    """
    with reading(path, must, if_refused), warnings.catch_warnings(), _opened(path) as file:
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # raised for files that are not pickles
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _opened(path: str | Path) -> AbstractContextManager[Any]:
    """The argument of ``torch.load``: a local path itself, or an open file of a remote file system."""
    if is_local_path(str(path)):
        return nullcontext(path)
    opened: AbstractContextManager[Any] = get_filesystem(path).open(str(path), "rb")
    return opened


def is_file(path: str | Path) -> bool:
    """Whether a file exists at a local path, or at a path that fsspec knows (``s3://...``). Web addresses are not queried.

    Example:
        >>> is_file("memory://bucket/missing.ckpt"), is_file(__file__)
        (False, True)
    """
    if str(path).startswith(("http://", "https://")):
        return False
    return bool(get_filesystem(path).isfile(str(path)))


def is_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint exists at a path: a file, or a directory into which each rank wrote its shard of the weights."""
    return is_file(path) or is_file(in_folder(path, SHARDED_METADATA))


def in_folder(folder: str | Path, name: str) -> str:
    """The path of a file in a local folder, or in one that fsspec knows.

    Example:
        >>> in_folder("s3://bucket/run", "a.ckpt")
        's3://bucket/run/a.ckpt'
    """
    return str(Path(folder) / name) if is_local_path(str(folder)) else f"{str(folder).rstrip('/')}/{name}"


def beside(path: str | Path, name: str) -> str:
    """The path of another file in the folder of ``path``.

    Example:
        >>> beside("s3://bucket/run/a.ckpt", "b.ckpt")
        's3://bucket/run/b.ckpt'
    """
    return (
        str(Path(path).with_name(name)) if is_local_path(str(path)) else in_folder(str(path).rpartition("/")[0], name)
    )


def _reason(error: Exception, if_refused: str) -> str:
    text = str(error).strip()
    # torch's own message recommends `weights_only=False`.
    if (refused := re.search(r"GLOBAL (\S+)", text)) is not None:
        return f"it holds {refused[1]}, which is neither weights nor plain data; nothing in it was run. {if_refused}".rstrip()
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return f"{error.strerror}."
    detail = "" if text.startswith("Weights only load failed") else text.partition("\n")[0][:100]
    return f"it is damaged, or torch did not write it ({type(error).__name__}{detail and ': '}{detail})."


def read_checkpoint(path: str | Path, must: str = _MUST, *, if_refused: str = "") -> dict[str, Any]:
    """Read a Lightning checkpoint, by :func:`read_file`.

    Raises:
        InputError: The file cannot be read, or is not a checkpoint.
    """
    checkpoint = read_file(path, must, if_refused=if_refused)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{must}, but {path} holds no `state_dict`.")
    return checkpoint


def read_weights(path: str | Path, must: str = _MUST, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint, or a file that holds only a state dict, as a mapping with a ``state_dict``.

    Raises:
        InputError: :func:`read_file` cannot read the file, or it holds no weights.
    """
    content = read_file(path, must, if_refused=TRUST, weights_only=weights_only)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    holds_weights = isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values())
    if not holds_weights and not (isinstance(content, Mapping) and LIGHTNING_VERSION in content):
        raise InputError(
            f"{str(path)!r} must hold a state dict, alone or under `state_dict`, but it holds a {type(content).__name__} without "
            "weights."
        )
    return dict(content) if "state_dict" in content else {"state_dict": dict(state)}


def hyperparameter_entries(module: LightningModule) -> dict[str, Any]:
    """The entries for a module's hyper-parameters in a checkpoint, as Lightning writes them for the module that it trains.

    Example:
        >>> class Lit(LightningModule):
        ...     def __init__(self, width=4):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        >>> hyperparameter_entries(Lit())
        {'hparams_name': 'kwargs', 'hyper_parameters': {'width': 4}}
    """
    given = module.hparams
    if not given:
        return {}
    name = hyperparameters_name(module)
    entries: dict[str, Any] = {} if name is None else {module.CHECKPOINT_HYPER_PARAMS_NAME: name}
    if isinstance(given, getattr(sys.modules.get("omegaconf"), "Container", ())):
        return {
            **entries,
            module.CHECKPOINT_HYPER_PARAMS_KEY: given,
            module.CHECKPOINT_HYPER_PARAMS_TYPE: type(given),
        }
    return {**entries, module.CHECKPOINT_HYPER_PARAMS_KEY: dict(given)}


_ENTRIES_AS_A_WHOLE = ("hyper_parameters", "datamodule_hyper_parameters", "callbacks")
"""Keys of a checkpoint whose entries are kept or left out as a whole: part of an argument or a state would mean something else."""


def plain_part(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of a checkpoint that loads under ``weights_only=True``, and the names of the entries that are left out.

    Mappings and sequences of other classes become dictionaries and lists.

    Example:
        >>> plain_part({"epoch": 1, "hyper_parameters": {"width": 4, "net": nn.Linear(1, 1)}})
        ({'epoch': 1, 'hyper_parameters': {'width': 4}}, ['hyper_parameters.net'])
    """
    left_out: list[str] = []
    return _plain_parts(checkpoint, "", left_out), left_out


def _plain_parts(value: Any, name: str, left_out: list[str]) -> Any:
    """The plain form of a value. Entries of mappings that have no plain form are dropped, and their names added to ``left_out``."""
    try:
        return _plain(value)
    except _NotPlainError:
        if isinstance(value, list):
            return [_plain_parts(item, f"{name}.{i}", left_out) for i, item in enumerate(value)]
        if not isinstance(value, Mapping):
            raise
    parts = {}
    for key, entry in value.items():
        own = f"{name}.{key}" if name else str(key)
        try:
            parts[key] = _plain(entry) if name in _ENTRIES_AS_A_WHOLE else _plain_parts(entry, own, left_out)
        except _NotPlainError:
            left_out.append(own)
    return parts


class _NotPlainError(Exception):
    """A value that ``weights_only=True`` refuses."""


def _plain(value: Any) -> Any:
    """The plain form of a value: a plain value itself, or a plain dictionary, list or number for a subclass of them."""
    if value is None or type(value) in (str, int, float, bool, Tensor, nn.Parameter):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        entries = {_plain(key): _plain(value[key]) for key in value}
        is_same = all(entries[key] is value[key] for key in value)
        return value if is_same and type(value) in (dict, OrderedDict) else entries
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | torch.Size | nn.Module):
        items = [_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if not _is_readable(value):
        raise _NotPlainError
    return value


def _is_readable(value: Any) -> bool:
    """Whether ``weights_only=True`` can read a value back."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # from pickle, torch, or the value's own methods
        return False
    return True


def write_checkpoint(strategy: Strategy, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint through the strategy, whole or not at all. Call it on all ranks; if rank 0 fails, all ranks raise."""
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            # A remote file becomes visible when it is closed, as a whole.
            with replacing(path) if is_local_path(str(path)) else nullcontext(path) as target:
                # `ModelParallelStrategy.save_checkpoint` is a collective.
                strategy.checkpoint_io.save_checkpoint(checkpoint, target)
                finish_writing(strategy)
        except Exception as caught:
            error = caught
    failure = strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failure is not None:
        raise RuntimeError(f"Rank 0 could not write {path}: {failure}")


def finish_writing(strategy: Strategy) -> None:
    """Wait for checkpoints that another thread is still writing."""
    if is_instance(strategy.checkpoint_io, AsyncCheckpointIO):
        strategy.checkpoint_io.teardown()  # waits for the thread; the next file starts a new one


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Lightning writes into the directory for temporary files and moves the result. If that directory is on another file system (a
    container with a mounted volume, ``/tmp`` in memory), moving is copying: a process that is killed meanwhile leaves half a file
    under the checkpoint's name, and the former content, of ``last.ckpt`` perhaps, is lost. This plugin writes beside the file and
    renames it. Paths of a remote file system are left to Lightning.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
        >>> [file.name for file in path.parent.iterdir()]
        ['last.ckpt']
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        if storage_options is not None or not is_local_path(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save(checkpoint, partial)
