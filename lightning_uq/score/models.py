"""A model from a ``-uq.ckpt`` or an exported graph, called with a batch of rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.callbacks.load import load_fitted
from lightning_uq.callbacks.save import COLUMNS
from lightning_uq.callbacks.sibling import WRITTEN_BY
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.importing import import_object
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.export import result_kind
from lightning_uq.networks.graph_files import GRAPHS, read_graph


class Model(ABC):
    """Rows [B, ...] to named outputs [B, ...] on the CPU. A row with NaN or infinity has a score of infinity and probabilities of NaN.

    Attributes:
        result: What ``probs`` are of: ``"classes"``, ``"labels"``, or None if that is unknown or there are none.
        outputs: Names of the outputs; None if they are known once the model was called.
        columns: Names of a table's columns that make the input, in order; empty if the file does not name them.
    """

    result: str | None
    outputs: Sequence[str] | None = None
    columns: Sequence[str] = ()

    @abstractmethod
    def cast(self, x: Tensor) -> Tensor:
        """Rows in the dtype that the model takes."""

    @abstractmethod
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""


class CheckpointModel(Model):
    """The module that :func:`~lightning_uq.load_fitted` returns."""

    def __init__(self, path: Path, network: str | None, task: str | None, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("`device` is 'cuda', but this machine has no CUDA device.")
        given = None if network is None else _network(network, path)
        self.columns = read_checkpoint(path, "MODEL must be a checkpoint").get(COLUMNS, ())
        self._fitted = load_fitted(path, given, task=task, nonfinite="inf").to(device)
        self._device = device
        self._dtype = next((p.dtype for p in self._fitted.parameters() if p.is_floating_point()), torch.float32)
        self.result: str | None = None

    def cast(self, x: Tensor) -> Tensor:
        """Numbers in the dtype of the weights; whole numbers, which may be tokens, stay as they are."""
        return x.to(self._dtype) if x.is_floating_point() else x

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        with torch.inference_mode():
            found = {name: values.cpu() for name, values in self._fitted(x.to(self._device)).items()}
        self.result = result_kind(self._fitted)
        return found


class GraphModel(Model):
    """An exported graph with one input."""

    def __init__(self, path: Path, device: str) -> None:
        if device == "cuda" and path.suffix == ".pt2" and not torch.cuda.is_available():
            raise InputError("`device` is 'cuda', but this machine has no CUDA device.")
        self._graph = read_graph(path, device)
        if len(self._graph.inputs) != 1:
            names = ", ".join(self._graph.info.inputs or self._graph.inputs)
            raise InputError(f"MODEL must have one input, but {path} has {len(self._graph.inputs)}: {names}.")
        self.result = self._graph.info.result
        self.outputs = self._graph.info.outputs or None
        self.columns = self._graph.info.columns

    def cast(self, x: Tensor) -> Tensor:
        """Rows in the dtype of the graph's input."""
        return x.to(self._graph.dtypes[0])

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        return self._graph(x)


def load_model(path: str | Path, network: str | None = None, task: str | None = None, device: str = "cpu") -> Model:
    """The model in a file.

    Args:
        path: A ``-uq.ckpt``, or a graph, ``.pt2`` or ``.onnx``.
        network: For a checkpoint that cannot be rebuilt from its file: ``"my.module:function"`` or the path of a class, called without arguments.
        task: For a checkpoint whose callbacks had a ``task``, the task's name.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        InputError: The file cannot be read, an argument is missing, or an argument does not apply to it.

    Example:
        >>> load_model("model.txt")
        Traceback (most recent call last):
        lightning_uq.errors.InputError: MODEL must end in .ckpt, .pt2 or .onnx, but it is model.txt.
    """
    path = Path(path)
    if path.suffix not in (".ckpt", *GRAPHS):
        raise InputError(f"MODEL must end in .ckpt, .pt2 or .onnx, but it is {path}.")
    if not path.is_file():
        raise InputError(f"MODEL: {path} does not exist or is not a file.")
    if path.suffix == ".ckpt":
        return CheckpointModel(path, network, task, device)
    if network is not None or task is not None:
        raise InputError(
            f"`network` and `task` apply to checkpoints only, and {path} holds the whole model. Leave them out."
        )
    return GraphModel(path, device)


def _network(name: str, path: Path) -> nn.Module | Callable[[], nn.Module]:
    """The module that a class or function at an import path builds, or the function itself if the checkpoint's module takes a factory."""
    factory: Any = import_object(name, "network")
    try:
        built = factory()
    except UQError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"`network`: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(built, nn.Module):
        raise InputError(
            f"`network`: {name}() must return a torch.nn.Module, but it returned a {type(built).__name__}."
        )
    is_ours = read_checkpoint(path).get(WRITTEN_BY, {}).get("is_ours")
    is_inner = is_ours and not is_instance(built, LightningModule)
    return factory if is_inner else built
