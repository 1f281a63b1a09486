"""Exports a trained network with everything fitted after its training as one graph that runs without this package."""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_uq.errors import InputError, UnsupportedError, UQError
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedPredictor
from lightning_uq.networks.graph_files import (
    GRAPHS,
    GraphInfo,
    check_columns,
    first_line,
    import_onnxruntime,
    quiet,
    save_onnx,
    save_torch,
)
from lightning_uq.writing import replacing

Fitted = FittedNetwork | FittedPredictor
_ONNX_LIMIT = 2**31  # the largest protobuf file in bytes


def export_fitted(fitted: Fitted, path: str | Path, example: Any, *, columns: Sequence[str] | None = None) -> None:
    """Write a module from :func:`~lightning_uq.load_fitted` as one graph with named outputs, for any number of rows.

    The file runs without this package: ``.pt2`` with ``torch.export.load``, and ``.onnx`` with onnxruntime. It is written only if the graph
    reproduces the module's outputs for the example, for one row more, for one row alone, and for a row with NaN, for which
    a graph always behaves like ``nonfinite="inf"``. Outputs must agree within the rounding of the module's dtype, sqrt(eps) of
    the largest output. A class whose score equals the threshold up to rounding may be in the set or not.

    The file describes itself in a JSON text with this package's ``version``, ``inputs``, ``outputs``, the names that were ``renamed`` (ONNX graphs use ``prediction_mean``
    for ``mean``, a name that is reserved there), whether ``probs`` are of ``classes`` or ``labels``, and ``columns``. The text is the entry
    ``lightning_uq`` of an ONNX file's ``metadata_props``, and the extra file ``lightning_uq.json`` of a ``.pt2``.

    Args:
        fitted: The module, on the device on which the graph will run.
        path: The file, ``.pt2`` or ``.onnx`` (the extra ``onnx``); an existing file is replaced.
        example: An input: a tensor [B, ...], or a mapping or a tuple of tensors with B rows each. Other nested structures, and objects such as
            graphs, are not supported. Axes other than the first keep the example's sizes.
        columns: Names of the table columns that form the input [B, D], in order. ``lightning-uq score`` then finds the columns by name, in any
            order; without names it uses them by position.

    Raises:
        InputError: An argument is invalid.
        UnsupportedError: torch cannot export this module, or the graph returns other outputs. No file is written.
        MissingExtraError: The path ends in ``.onnx`` and the extra is not installed.

    Example:
        >>> import tempfile
        >>> from lightning_uq.networks.ensemble import EnsembleNetwork
        >>> fitted = FittedNetwork(EnsembleNetwork([torch.nn.Linear(2, 3)]), temperature=torch.tensor(2.0))
        >>> path = Path(tempfile.mkdtemp()) / "model.pt2"
        >>> export_fitted(fitted, path, torch.zeros(4, 2))
        >>> graph = torch.export.load(path).module()
        >>> graph(torch.zeros(7, 2))["probs"].shape
        torch.Size([7, 3])
    """
    path = Path(path)
    if not isinstance(fitted, Fitted):
        raise InputError(
            f"`fitted` must be a module from `load_fitted`, but its type is {type(fitted).__name__}. Call `load_fitted(path)`."
        )
    if path.suffix not in GRAPHS:
        raise InputError(f"`path` must end in {' or '.join(GRAPHS)}, but it is {path}.")
    x, inputs = _inputs(example)
    named = check_columns(columns)
    if named and (not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != len(named)):
        came = f"has shape {list(example.shape)}" if isinstance(x, Tensor) else f"holds {len(inputs)} tensors by name"
        raise InputError(
            f"`columns` must name the columns of an `example` [B, D], but it holds {len(named)} names and `example` {came}."
        )
    is_onnx = path.suffix == ".onnx"
    if is_onnx:
        import_onnxruntime()
        size = sum(tensor.nbytes for tensor in fitted.state_dict().values())
        if size >= _ONNX_LIMIT:
            raise UnsupportedError(
                f"An ONNX file holds less than 2 GB, but the module's tensors are {size / 1e9:.1f} GB. Use .pt2."
            )
    with torch.no_grad():
        fitted(x)  # raises the module's own errors, and makes its output names known
    names = fitted.output_names
    own = [*_expected(fitted, x)]
    renamed = {name: key for name, key in zip(names, own, strict=True) if name != key} if is_onnx else {}
    info = GraphInfo(_version(), inputs, own, renamed, result_kind(fitted), named)
    with replacing(path) as partial:
        try:
            with torch.no_grad(), quiet():
                if is_onnx:
                    save_onnx(_onnx_program(_program(fitted, x), inputs, names), info, partial)
                else:
                    save_torch(_program(fitted, x), info, partial)
            graph = GRAPHS[path.suffix](partial, str(tree_leaves(x)[0].device) if not is_onnx else "cpu")
        except UQError:
            raise
        except Exception as error:  # several packages raise errors of any kind
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]  # no interrupt causes an error
            raise UnsupportedError(f"This module cannot be exported as {path.suffix}: {first_line(error)}") from error
        _compare(fitted, graph, x, path)


def result_kind(fitted: Fitted) -> Literal["classes", "labels"] | None:
    """The kind of a module's ``probs``, or None for a regressor, which has none.

    Example:
        >>> result_kind(FittedNetwork(torch.nn.Identity(), of_labels=True))
        'labels'
    """
    if isinstance(fitted, FittedNetwork):
        return "labels" if fitted.of_labels else "classes"
    if "probs" not in fitted.output_names:
        return None
    return "classes" if fitted.has_classes else "labels"


def _version() -> str:
    return str(import_module("lightning_uq").__version__)  # at run time, since the package imports this module


# ---------------------------------------------------------------------- writing


def _inputs(example: Any) -> tuple[Any, list[str]]:
    """The example with at least two rows, so that the graph does not depend on their number, and the names of its tensors."""
    names, tensors = ["x"], [example]
    if isinstance(example, Mapping):
        example = dict(example)
        names, tensors = list(map(str, example)), list(example.values())
    elif isinstance(example, tuple):
        names, tensors = [f"x_{i}" for i in range(len(example))], list(example)
    if not tensors or not all(isinstance(one, Tensor) and one.ndim for one in tensors):
        raise InputError(
            "`example` must be a tensor [B, ...], or a mapping or a tuple of such tensors, but "
            f"{_types(tensors) if tensors else 'it is empty'}. Other inputs are not supported."
        )
    sizes = {len(one) for one in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise InputError(
            f"All tensors of `example` must have the same number of rows, at least one, but they have {sorted(sizes)}."
        )
    return (_rows(example, 2) if sizes == {1} else example), names


def _types(tensors: list[Any]) -> str:
    kinds = [
        type(one).__name__ if not isinstance(one, Tensor) or one.ndim else "a tensor without axes" for one in tensors
    ]
    return f"it holds {', '.join(dict.fromkeys(kinds))}" if len(tensors) > 1 else f"it is {kinds[0]}"


def _rows(x: Any, num: int) -> Any:
    """The first ``num`` rows, repeated from the start if there are fewer."""
    return tree_map(lambda one: one[torch.arange(num, device=one.device) % len(one)], x)


def _program(fitted: Fitted, x: Any) -> Any:
    batch = torch.export.Dim("batch", max=2**62)  # torch 2.6 fails on a slice of all rows if there may be 2^63 - 1
    shapes = (tree_map(lambda one: {0: batch}, x),)
    return torch.export.export(fitted, (x,), dynamic_shapes=shapes, strict=False)


def _onnx_program(program: Any, inputs: list[str], outputs: list[str]) -> Any:
    """A program of torch.onnx from one of torch.export. From a module, ``torch.onnx`` would take a mapping as keyword arguments."""
    names: dict[str, Any] = {"input_names": inputs, "output_names": outputs}
    return torch.onnx.export(program, dynamo=True, verbose=False, **names)


# ---------------------------------------------------------------------- comparing


def _compare(fitted: Fitted, graph: Any, x: Any, path: Path) -> None:
    """Reject a graph whose outputs differ from the module's.

    Raises:
        UnsupportedError: The outputs differ, or the graph fails.
    """
    num = len(tree_leaves(x)[0])
    with_nan = _with_nan(_rows(x, num + 1))
    cases = {f"{num} rows": x, f"{num + 1} rows": _rows(x, num + 1), "one row": _rows(x, 1), "a row with NaN": with_nan}
    for name, given in cases.items():
        if given is None:
            continue
        try:
            found = graph(*tree_leaves(given))
        except Exception as error:  # torch and onnxruntime raise errors of any kind
            raise UnsupportedError(
                f"The exported graph fails on {name}, so {path} is not written: {first_line(error)}"
            ) from error
        expected = _expected(fitted, given)
        if list(found) != list(expected):
            raise UnsupportedError(
                f"The exported graph returns {list(found)}, but the module returns {list(expected)}, so {path} is not written."
            )
        for key, values in expected.items():
            far = _deviating(found[key], values, _tolerance(fitted, x))
            if values.dtype == torch.bool and bool(far.any()):
                far &= ~_undecided(fitted, given, key)
            if bool(far.any()):
                raise UnsupportedError(
                    f"The exported graph returns another `{key}` than the module on {name} ({int(far.sum())} of {far.numel()} numbers), so "
                    f"{path} is not written. Please report this with the network's layers; another format may be exact."
                )


def _expected(fitted: Fitted, x: Any) -> dict[str, Tensor]:
    """The module's outputs for an input whose rows may hold NaN, as in a graph."""
    before, fitted.nonfinite = fitted.nonfinite, "inf"
    try:
        with torch.no_grad():
            return {name: values.cpu() for name, values in fitted(x).items()}
    finally:
        fitted.nonfinite = before


def _with_nan(x: Any) -> Any:
    """The input with NaN in the first row, or None if it has only integers."""
    if not any(one.is_floating_point() for one in tree_leaves(x)):
        return None

    def changed(one: Tensor) -> Tensor:
        one = one.clone()
        if one.is_floating_point():
            one[0] = torch.nan
        return one

    return tree_map(changed, x)


def _tolerance(fitted: Fitted, x: Any) -> float:
    """The square root of the coarsest rounding among the tensors of the module and of the input."""
    tensors = [*fitted.state_dict().values(), *tree_leaves(x)]
    return math.sqrt(max((torch.finfo(one.dtype).eps for one in tensors if one.is_floating_point()), default=1e-7))


def _deviating(found: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """The mask of the numbers that differ by more than the tolerance times the largest number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.ones_like(expected, dtype=torch.bool)
    if not expected.is_floating_point():
        return found != expected
    one, other = found.double(), expected.double()
    finite = other[other.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return ~torch.isclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _undecided(fitted: Fitted, x: Any, name: str) -> Tensor:
    """The mask of the answers that depend on the last digits of the input."""
    answers = [_expected(fitted, tree_map(lambda one, by=by: _moved(one, by), x))[name] for by in (-4, 0, 4)]
    return torch.stack(answers).any(0) & ~torch.stack(answers).all(0)


def _moved(one: Tensor, steps: int) -> Tensor:
    return one * (1 + steps * torch.finfo(one.dtype).eps) if one.is_floating_point() else one
