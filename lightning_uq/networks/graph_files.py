"""Files of exported graphs, ``.pt2`` (torch.export) and ``.onnx``: their descriptions, and how to run them."""

import json
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError, MissingExtraError

KEY = "lightning_uq"
"""Key of the description in ``metadata_props`` of an ONNX file; in a ``.pt2`` the extra file ``lightning_uq.json``."""

_EXTRA_FILE = f"{KEY}.json"


@dataclass(frozen=True)
class GraphInfo:
    """The description of a graph in its file, as JSON.

    Args:
        version: The version of this package that wrote the file; None for other files.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs in the module, in order.
        renamed: The module's names of the outputs with another name in the file: ``{"prediction_mean": "mean"}``.
        result: The kind of ``probs``: ``"classes"`` [B, C] or ``"labels"`` [B, L] that are on or off; None without ``probs``.
        columns: Names of the table columns that form the input [B, D], in order; empty if the file has none.
    """

    version: str | None = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    result: Literal["classes", "labels"] | None = None
    columns: Sequence[str] = ()

    def to_json(self) -> str:
        """The text in the file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes | None) -> "GraphInfo":
        """Read the text of the file; without a text, all fields are empty."""
        found = json.loads(text) if text else {}
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


class Graph(ABC):
    """An exported graph, called with the tensors of its inputs. It returns its outputs by the module's names.

    Attributes:
        info: The description in its file.
        inputs: Names of the inputs in the file, in order.
        dtypes: The dtype of each input.
    """

    suffix: ClassVar[str]
    info: GraphInfo
    inputs: list[str]
    dtypes: list[torch.dtype]

    @abstractmethod
    def __init__(self, path: Path, device: str) -> None: ...

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs by name, on the CPU."""


class TorchGraph(Graph):
    """A graph of torch.export."""

    suffix = ".pt2"

    def __init__(self, path: Path, device: str) -> None:
        extra: dict[str, Any] = {_EXTRA_FILE: ""}
        with quiet(), path.open("rb") as stream:
            program = torch.export.load(stream, extra_files=extra)
            if device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            self._module = program.module()
        self.info = GraphInfo.from_json(extra[_EXTRA_FILE])
        self.inputs = list(program.graph_signature.user_inputs)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        self.dtypes = [getattr(values[name], "dtype", torch.float32) for name in self.inputs]
        self._spec, self._device = program.call_spec.in_spec, device

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        moved = [tensor.to(self._device) for tensor in tensors]
        args, kwargs = torch.utils._pytree.tree_unflatten(moved, self._spec)
        with torch.inference_mode():
            found = self._module(*args, **kwargs)
        if not isinstance(found, Mapping):
            raise InputError(
                f"The graph must return outputs by name, but it returns a {type(found).__name__}. Write the file with `export_fitted`."
            )
        return {name: tensor.cpu() for name, tensor in found.items()}


class OnnxGraph(Graph):
    """A graph that onnxruntime runs."""

    suffix = ".onnx"

    def __init__(self, path: Path, device: str) -> None:
        onnxruntime = import_onnxruntime()
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise InputError("This onnxruntime cannot run on cuda. Install onnxruntime-gpu, or use the cpu.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # its errors are raised, so a log would only repeat them
        self._session = onnxruntime.InferenceSession(path, options, providers=[provider])
        self.info = GraphInfo.from_json(self._session.get_modelmeta().custom_metadata_map.get(KEY))
        self.inputs = [one.name for one in self._session.get_inputs()]
        self.dtypes = [_DTYPES.get(one.type, torch.float32) for one in self._session.get_inputs()]
        self._names = [self.info.renamed.get(one.name, one.name) for one in self._session.get_outputs()]

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        given = {name: tensor.cpu().numpy() for name, tensor in zip(self.inputs, tensors, strict=True)}
        found = self._session.run(None, given)
        return {name: torch.as_tensor(values) for name, values in zip(self._names, found, strict=True)}


_DTYPES = {
    "tensor(double)": torch.float64,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

GRAPHS: Mapping[str, type[Graph]] = {one.suffix: one for one in (TorchGraph, OnnxGraph)}
"""The kinds of graph by the suffix of their files."""


def read_graph(path: str | Path, device: str = "cpu") -> Graph:
    """The graph in a file.

    Raises:
        InputError: The file cannot be read.
        MissingExtraError: The file is an ONNX file, and onnxruntime is not installed.
    """
    path = Path(path)
    try:
        return GRAPHS[path.suffix](path, device)
    except (MissingExtraError, InputError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path} cannot be read as a graph: {first_line(error)}") from error


def check_columns(columns: Sequence[str] | None) -> list[str]:
    """The names of a table's columns as a list, empty for None.

    Raises:
        InputError: The argument is not a list of different names.

    Example:
        >>> check_columns(["age", "age"])
        Traceback (most recent call last):
        lightning_uq.errors.InputError: `columns` must be a list of different names, but it is ['age', 'age'].
    """
    if columns is None:
        return []
    names = None if isinstance(columns, str) or not isinstance(columns, Iterable) else list(columns)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(f"`columns` must be a list of different names, but it is {columns!r}.")
    return [str(name) for name in names]  # a subclass of str, such as numpy's, is not plain data


def import_onnxruntime() -> Any:
    """Import ``onnxruntime``.

    Raises:
        MissingExtraError: It is not installed, or a package for writing ONNX files is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX files need more packages: pip install 'lightning-uq[onnx]'.") from error
    return onnxruntime


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return first_lines(error, 1)


def first_lines(error: BaseException, num: int = 2) -> str:
    """The first lines of an error's text in one line, or its type. The second line of onnxruntime's error about a shape has the two sizes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:num]) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which torch neither warns nor logs. An exception reports anything that a user must act on."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def save_torch(program: Any, info: GraphInfo, path: Path) -> None:
    """Write a program of torch.export."""
    with quiet(), path.open("wb") as stream:
        torch.export.save(program, stream, extra_files={_EXTRA_FILE: info.to_json()})


def save_onnx(program: Any, info: GraphInfo, path: Path) -> None:
    """Write a program of torch.onnx, as one file."""
    program.model.metadata_props[KEY] = info.to_json()
    with quiet():
        program.save(str(path), external_data=False)
