"""The calibrations of the predictions that a callback was fitted to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions import Prediction

_CARRIED = "carried."
"""Prefix of the calibrations that the fitted predictions carried, in the state."""

_NUM_INDICES = "num_indices"


class Carried:
    """The calibrations and the number of hypotheses of the fitted predictions. The result is valid only for predictions with the same ones.

    Args:
        who: Name of the callback, for error messages.
        tensors: The fitted tensors of the callback.
    """

    def __init__(self, who: str, tensors: Mapping[str, Any]) -> None:
        self.who = who
        self.tensors = {name.removeprefix(_CARRIED): t for name, t in tensors.items() if name.startswith(_CARRIED)}

    @property
    def has_calibration(self) -> bool:
        """Whether the predictions were calibrated."""
        return bool(self.tensors.keys() - {_NUM_INDICES})

    def check(self, prediction: Prediction) -> None:
        """Raise an :class:`InputError` for a prediction with other calibrations. Pooled predictions cannot be checked."""
        if prediction.num_indices is None or torch.compiler.is_compiling():
            return
        found = {name.removeprefix(_CARRIED): tensor for name, tensor in carried_by(prediction).items()}
        for name in {**self.tensors, **found}:
            if name == _NUM_INDICES:
                self._check_indices(prediction)
                continue
            own, new = self.tensors.get(name), found.get(name)
            if own is None or new is None or not _is_same(own, new):
                raise InputError(
                    f"{self.who} was fitted to predictions with {_described(name, own)}, but this one has {_described(name, new)}. Fit "
                    f"{self.who} again to predictions with the same calibration."
                )

    def _check_indices(self, prediction: Prediction) -> None:
        own = self.tensors.get(_NUM_INDICES)  # None if the file does not hold it
        if own is not None and int(own) != prediction.num_indices:
            raise InputError(
                f"{self.who} was fitted to predictions with {int(own)} hypotheses, but this one has {prediction.num_indices}. Predict with the same "
                f"number (`num_eval_samples`), or fit {self.who} again."
            )


def carried_by(prediction: Prediction) -> dict[str, Tensor]:
    """The calibrations that all rows of a prediction share, and its number of hypotheses if known."""
    num = {} if prediction.num_indices is None else {_NUM_INDICES: torch.tensor(prediction.num_indices)}
    return {f"{_CARRIED}{name}": tensor for name, tensor in {**prediction.calibrations, **num}.items()}


def _is_same(own: Tensor, new: Tensor) -> bool:
    return own.shape == new.shape and torch.allclose(
        own.double(), new.cpu().double(), rtol=1e-2, atol=1e-3, equal_nan=True
    )


def _described(name: str, tensor: Tensor | None) -> str:
    if tensor is None:
        return f"no {name.replace('_', ' ')}"
    return f"a {name.replace('_', ' ')}" + (f" of {float(tensor):.4g}" if tensor.numel() == 1 else "")
