"""The calibrations of predictions that something was fitted to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions import Prediction

_CARRIED = "carried."
"""Prefix of the calibrations that the fitted predictions carried, in the state."""


class Carried:
    """The calibrations that fitted predictions carried: a result is only for predictions with the same ones.

    Args:
        who: The callback, for messages.
        tensors: Its fitted tensors.
    """

    def __init__(self, who: str, tensors: Mapping[str, Any]) -> None:
        self.who = who
        self.tensors = {name.removeprefix(_CARRIED): t for name, t in tensors.items() if name.startswith(_CARRIED)}

    def check(self, prediction: Prediction) -> None:
        """Raise an :class:`InputError` for a prediction that was calibrated otherwise. Pooled ones no longer tell."""
        if prediction.num_indices is None or torch.compiler.is_compiling():
            return
        found = {name.removeprefix(_CARRIED): tensor for name, tensor in carried_by(prediction).items()}
        for name in {**self.tensors, **found}:
            own, new = self.tensors.get(name), found.get(name)
            if own is None or new is None or not _is_close(own, new):
                raise InputError(
                    f"{self.who} was fitted to predictions with {_said(name, own)}, but this one has {_said(name, new)}. Fit "
                    f"{self.who} again, to predictions that are calibrated as this one is."
                )


def carried_by(prediction: Prediction) -> dict[str, Tensor]:
    """The calibrations that all rows of a prediction share."""
    return {f"{_CARRIED}{name}": tensor for name, tensor in prediction.calibrations.items()}


def _is_close(own: Tensor, new: Tensor) -> bool:
    return own.shape == new.shape and torch.allclose(
        own.double(), new.cpu().double(), rtol=1e-2, atol=1e-3, equal_nan=True
    )


def _said(name: str, tensor: Tensor | None) -> str:
    if tensor is None:
        return f"no {name.replace('_', ' ')}"
    return f"a {name.replace('_', ' ')}" + (f" of {float(tensor):.4g}" if tensor.numel() == 1 else "")
