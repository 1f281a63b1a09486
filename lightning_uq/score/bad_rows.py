"""The row of a batch on which a model fails."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from lightning_uq.score.models import Model


def first_bad_row(model: Model, x: Tensor) -> tuple[int, Exception] | None:
    """The first row of a batch on which a model fails, such as one with an unknown category, and the error; None if it is not the row's fault.

    It is not a row's fault if the model accepts each row alone, or if it accepts no row of this shape, not even one of zeros.

    Args:
        model: A model that failed with this batch.
        x: The batch [B, ...].
    """
    errors = (_error(model, one) for one in torch.split(x, 1))
    found = next(((row, error) for row, error in enumerate(errors) if error is not None), None)
    if found is None:
        return None
    row, _ = found
    others: Iterable[Tensor] = chain([torch.zeros_like(x[:1])], (x[i : i + 1] for i in range(row + 1, len(x))))
    accepts_others = row > 0 or any(_error(model, one) is None for one in others)
    return found if accepts_others else None


def _error(model: Model, x: Tensor) -> Exception | None:
    """The error of a call, or None."""
    try:
        model(x)
    except Exception as error:  # of torch, onnxruntime, or the user's network
        return error
    return None
