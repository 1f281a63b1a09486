"""Checkpoint files: read as weights and plain data alone, written whole or not at all."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_uq._lightning import is_local_path
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.writing import replacing

_MUST = "`path` must name a checkpoint"


@contextmanager
def reading(path: str | Path, must: str = _MUST) -> Iterator[None]:
    """Raise an :class:`InputError` that begins with ``must`` and names the file if its body cannot read it."""
    try:
        yield
    except Exception as error:  # a damaged file raises anything at all
        raise InputError(f"{must}, but {path} cannot be read: {_reason(error)}") from error


def read_file(path: str | Path, must: str = _MUST) -> Any:
    """Read what ``torch.save`` wrote, on the CPU. Pickled code in it is refused, not run.

    Args:
        path: The file.
        must: Beginning of the error: what the file must be.

    Raises:
        InputError: The file is missing or damaged, or holds objects other than weights and plain data.
    """
    with reading(path, must), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is no pickle
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    # torch's own words recommend `weights_only=False`.
    if (refused := re.search(r"GLOBAL (\S+)", text)) is not None:
        return f"it holds {refused[1]}, which is neither weights nor plain data; nothing in it was run."
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return f"{error.strerror}."
    detail = "" if text.startswith("Weights only load failed") else text.partition("\n")[0][:100]
    return f"it is damaged, or no file that torch wrote ({type(error).__name__}{detail and ': '}{detail})."


def read_checkpoint(path: str | Path, must: str = _MUST) -> dict[str, Any]:
    """A Lightning checkpoint, read as :func:`read_file` reads.

    Raises:
        InputError: The file cannot be read, or is not a checkpoint.
    """
    checkpoint = read_file(path, must)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{must}, but {path} holds no `state_dict`.")
    return checkpoint


def read_weights(path: str | Path, must: str = _MUST) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and hyper-parameters of a Lightning checkpoint, or of a file that holds a state dict alone.

    Raises:
        InputError: The file cannot be read as :func:`read_file` reads, or holds no weights.
    """
    content = read_file(path, must)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"{str(path)!r} must hold a state dict, alone or under `state_dict`, but it holds a {type(content).__name__} without "
            "weights."
        )
    return dict(state), dict(content.get("hyper_parameters", {}))


def check_plain(values: Mapping[str, Any], what: str, why: str) -> None:
    """Raise an :class:`InputError`, with the reason ``why``, if a value could be written to a checkpoint but not read back."""
    for name, value in values.items():
        file = io.BytesIO()
        try:
            plain = not isinstance(value, nn.Module)
            if plain:
                torch.save(value, file)
                file.seek(0)
                torch.load(file, weights_only=True)
        except Exception:  # of pickle's, of torch's, or of the value's own
            plain = False
        if not plain:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise InputError(
                f"{what[0].upper()}{what[1:]} must be plain data, but `{name}` holds a {kind}, and {why.format(name=name)}"
            )


def write_checkpoint(strategy: Strategy, checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint through the strategy, whole or not at all; called on all ranks, which all fail where rank 0 does."""
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            with replacing(path) as partial:
                strategy.save_checkpoint(checkpoint, partial)
                finish_writing(strategy)
        except Exception as caught:
            error = caught
    failure = strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failure is not None:
        raise RuntimeError(f"Rank 0 could not write {path}: {failure}")


def finish_writing(strategy: Strategy) -> None:
    """Wait for checkpoints that another thread is writing."""
    if is_instance(strategy.checkpoint_io, AsyncCheckpointIO):
        strategy.checkpoint_io.teardown()  # it waits, and begins anew with the next file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Lightning writes into the directory for temporary files and moves the result. Where that lies on another file system (a
    container with a mounted volume, ``/tmp`` in memory), moving is copying, and a process that is killed meanwhile leaves half
    a file under the checkpoint's name, ``last.ckpt`` perhaps, whose former content is gone. This plugin writes beside the file
    and renames. Paths of a remote file system are left to Lightning.

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
