"""NaN and infinity are never confident answers: they raise, or give a score of plus infinity."""

from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_uq.errors import NotFiniteError, NotFittedError
from lightning_uq.networks.finite import NonFinite, check_finite, nonfinite_rows
from lightning_uq.predictions import Prediction
from lightning_uq.tasks import Task


def check_numbers(output: Tensor, task: Task) -> None:
    """Reject outputs [Z, B, ...] with numbers that ``task`` cannot use."""
    if bool(output.detach().sum().isfinite()):
        return  # one pass over the numbers; an overflowing sum, or an excluded class, needs a closer look
    if bool(task.invalid(output).any()):
        refuse_outputs(int(unusable_rows(output, task).sum()), output.shape[1])


def refuse_outputs(unusable: int, rows: int) -> NoReturn:
    """Raise the error for outputs with unusable rows."""
    raise NotFiniteError(
        f"The network must return finite numbers, but its outputs for {unusable} of {rows} rows hold NaN or infinity. "
        "Its weights may hold them too, for instance after a training that diverged."
    )


def unusable_rows(output: Tensor, task: Task) -> Tensor:
    """The mask [B] of rows of outputs [Z, B, ...] from which ``task`` cannot predict."""
    return task.invalid(output).transpose(0, 1).flatten(1).any(1)


class FiniteRows:
    """The rows of one batch for which a prediction is possible.

    Args:
        x: The input.
        nonfinite: ``"error"`` rejects a row with NaN or infinity in the input or in the outputs. ``"inf"`` gives it probabilities of
            NaN and scores of plus infinity.
        where: What the rows belong to, for the error, such as ``"of batch 3"``.

    Raises:
        NotFiniteError: With ``"error"``, the input is not finite.
    """

    def __init__(self, x: Any, nonfinite: NonFinite, where: str = "") -> None:
        self.nonfinite = nonfinite
        if nonfinite == "error":
            check_finite(x, where)
        self._bad = nonfinite_rows(x) if nonfinite == "inf" else None

    def outputs(self, output: Tensor, task: Task) -> Tensor:
        """Outputs [Z, B, ...], checked, or with NaN in the unusable rows.

        Raises:
            NotFiniteError: With ``"error"``, the outputs are not finite.
        """
        if self.nonfinite == "error":
            check_numbers(output, task)
            return output
        invalid = unusable_rows(output, task)
        self._bad = invalid if self._bad is None else invalid | self._bad.to(output.device)
        return self._filled(output, 1, torch.nan)

    def features(self, features: Tensor) -> Tensor:
        """Features [M, B, D], or [M, B, D, *P], with NaN in the rows whose input is not finite."""
        return self._filled(features, 1, torch.nan)

    def prediction(self, prediction: Prediction) -> Prediction:
        """The prediction, with a score of plus infinity and a log-density of minus infinity in the unusable rows."""
        if self._bad is None:
            return prediction
        carried = {"log_density": -torch.inf, "ood_score": torch.inf}
        for name, bad in carried.items():
            with suppress(NotFittedError):  # no score
                prediction = prediction.replace(**{name: self._filled(getattr(prediction, name), 0, bad)})
        return prediction

    def _filled(self, values: Tensor, axis: int, value: float) -> Tensor:
        if self._bad is None:
            return values
        rows = self._bad.to(values.device).reshape(*[1] * axis, -1, *[1] * (values.ndim - axis - 1))
        return values.masked_fill(rows, value)
