"""Saves the predictions of the test rows, one file per method and seed, for computing other numbers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions import Prediction
from lightning_uq.writing import replacing

FOLDER = "predictions"
"""The folder of the predictions in a run's directory."""

INTERVAL = 0.9
"""The share of a predicted distribution between ``lower`` and ``upper``."""


def prediction_path(directory: Path, method: str, seed: int) -> Path:
    """The file of a method's predictions for one seed.

    Example:
        >>> prediction_path(Path("runs"), "softmax", 3).as_posix()
        'runs/predictions/softmax-3.npz'
    """
    return directory / FOLDER / f"{method}-{seed}.npz"


def columns_of(prediction: Prediction, target: Tensor) -> dict[str, Tensor]:
    """The columns of a batch in the file: the target, and all named results of the prediction, with a central interval if it has one.

    Args:
        prediction: The prediction of a batch [B], on the CPU.
        target: Its targets [B, ...].

    Example:
        >>> from lightning_uq import CategoricalPrediction
        >>> columns = columns_of(CategoricalPrediction(torch.zeros(1, 2, 3)), torch.tensor([0, 2]))
        >>> columns["target"].tolist(), columns["probs"].shape
        ([0, 2], torch.Size([2, 3]))
    """
    try:
        named = prediction.to_dict(INTERVAL)
    except InputError:  # no such interval: the members were discarded, or the quantiles do not reach it
        named = prediction.to_dict()
    return {"target": target, **named}


def save_predictions(
    path: Path, row_ids: Tensor, batches: Sequence[dict[str, Tensor]], class_names: Sequence[str] = ()
) -> None:
    """Write predictions atomically, to a file for ``numpy.load``.

    Args:
        path: The file.
        row_ids: Positions of the test rows in the whole data [N]: the array ``index``.
        batches: The columns [B, ...] of each batch, by name.
        class_names: Names of the classes 0, 1, ... or of the labels in the data: the array ``class_names``, if there are any.
    """
    arrays = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    # numpy has no bfloat16.
    arrays = {
        name: one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for name, one in arrays.items()
    }
    content = io.BytesIO()
    numbers: dict[str, Any] = {name: one.numpy() for name, one in arrays.items()}
    if class_names:
        numbers["class_names"] = np.array(class_names, dtype=np.str_)
    np.savez_compressed(content, index=row_ids.numpy(), **numbers)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content.getvalue())
