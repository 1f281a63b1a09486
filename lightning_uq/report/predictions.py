"""Predictions as a table: one row an input, one column a number."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.prediction import Prediction


def write_predictions(predictions: Sequence[Any], path: Path) -> int:
    """Write the batches that ``trainer.predict`` returned to a CSV file, whole or not at all; returns the number of rows.

    Columns are those of :meth:`Prediction.to_dict`; what has several numbers an input has a column each, ``probs_0`` ...

    Args:
        predictions: One prediction a batch.
        path: The file; it is replaced where it exists.

    Raises:
        InputError: They are no predictions of this package's.
    """
    foreign = next((p for p in predictions if not isinstance(p, Prediction)), None)
    if not predictions or foreign is not None:
        came = "none" if not predictions else type(foreign).__name__
        raise InputError(f"Expected predictions of this package's modules to write to {path}, but got {came}.")
    columns: dict[str, Tensor] = {}
    for name, values in type(predictions[0]).cat(list(predictions)).to_dict().items():
        flat = values.cpu().flatten(1) if values.ndim > 1 else values.cpu().unsqueeze(1)
        names = [name] if values.ndim == 1 else [f"{name}_{i}" for i in range(flat.shape[1])]
        columns.update(zip(names, flat.T, strict=True))
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    partial.replace(path)
    return len(next(iter(columns.values())))
