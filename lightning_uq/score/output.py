"""The columns of the output, named as :class:`~lightning_uq.PredictionWriter` names them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_uq.callbacks.prediction_files import Block, ParquetFile, import_pyarrow


def without_maps(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that are numbers of a whole input, such as its alarm: a table has no place for numbers of its pixels.

    A map has the axes of the pixels behind those of classes or dimensions. Beside such a map, [B, H, W] is a map, too, of one number per
    pixel; without one it is a horizon [B, H, D].

    Example:
        >>> list(without_maps({"probs": torch.ones(1, 3, 8, 8), "ood_score": torch.ones(1)}))
        ['ood_score']
    """
    has_maps = any(values.ndim > (2 if name in ("probs", "prediction_set") else 3) for name, values in outputs.items())
    return {name: values for name, values in outputs.items() if values.ndim <= 2 or not has_maps}


def make_block(outputs: Mapping[str, Tensor], result: str | None) -> Block:
    """Outputs of some rows as arrays, with ``label`` and ``confidence`` before ``probs``, and ``set_size`` behind ``prediction_set``.

    The label of a row whose probabilities are NaN is -1.

    Args:
        outputs: Tensors [B], [B, D] or [B, H, D], no maps.
        result: What ``probs`` are of: ``"classes"``, ``"labels"``, or None for no label.

    Example:
        >>> make_block({"probs": torch.tensor([[0.75, 0.25]])}, "classes")["label"]
        array([0])
    """
    named: dict[str, Tensor] = {}
    for name, values in outputs.items():
        if name == "probs" and result is not None:
            highest, label = (
                values.max(1) if result == "classes" else (torch.maximum(values, 1 - values), (values > 0.5).long())
            )
            named |= {
                "label": torch.where(values.isnan().any(1) if result == "classes" else values.isnan(), -1, label),
                "confidence": highest,
            }
        named[name] = values
        if name == "prediction_set":
            named["set_size"] = values.sum(1)
    half = (torch.float16, torch.bfloat16)
    return {name: (values.float() if values.dtype in half else values).numpy() for name, values in named.items()}


class ScoreFile(ParquetFile):
    """A Parquet file whose columns may have a type of pyarrow's own.

    Args:
        path: The file.
        first: Its first rows.
        types: The types of columns that hold objects.
    """

    def __init__(self, path: Path, first: Block, types: Mapping[str, Any]) -> None:
        self._types = types
        super().__init__(path, first)

    def open(self, empty: Block) -> None:
        """Write the schema."""
        pyarrow, parquet = import_pyarrow()
        kinds = {
            name: self._types.get(name) or pyarrow.from_numpy_dtype(values.dtype) for name, values in empty.items()
        }
        self._schema = pyarrow.schema(kinds)
        self._writer = parquet.ParquetWriter(self.partial, self._schema)

    def write(self, columns: Block) -> None:
        """Write some rows."""
        pyarrow, _ = import_pyarrow()
        self._writer.write_table(pyarrow.table(columns, schema=self._schema))
