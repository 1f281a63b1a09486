"""Reads the sums that determine a temperature, without keeping rows."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_uq.functional.temperature_sums import ROWS, SUMS_SHAPE, temperature_sums
from lightning_uq.running.classes import CalibrationReader
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.ranks import sum_of_ranks

_ENOUGH = 2**17  # number of logits that fit into a cache
_PART = 2**22  # logits at a time, in float64: a language model's batch has one per token and word


class TemperatureReader(CalibrationReader):
    """Adds up the contributions of batches to a temperature of the mean probabilities, see :func:`temperature_sums`.

    Args:
        reader: Reader of the model's outputs.
        who: Name of the calibrating callback, for messages.
        where: What the batches belong to; it begins messages.
        per_label: Whether each of several labels per input has its own sums.
    """

    def __init__(self, reader: LogitReader, who: str, where: str, *, per_label: bool = False) -> None:
        super().__init__(reader, who, where)
        self.per_label = per_label
        self._sums: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def keep(self, keys: Tensor, prediction: Any, labels: Tensor, group: Tensor | None) -> None:
        """Buffer the rows of a batch, and add them to the sums once there are enough: each update takes some thousand small operations."""
        if not len(labels):
            return
        size = max(1, _PART // prediction[:1].calibration_logits.numel())
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            own = None if group is None or not self.per_label else group[part]
            self._waiting.append((self.logits_of(prediction[part]).squeeze(0), labels[part], own))
            if sum(logits.numel() for logits, *_ in self._waiting) >= _ENOUGH:
                self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        logits, labels, groups = zip(*self._waiting, strict=True)
        self._waiting = []
        own = (torch.cat(groups), self.num_groups) if self.per_label else (None, 1)
        sums = temperature_sums(torch.cat(logits), torch.cat(labels), *own)
        self._sums = sums if self._sums is None else self._sums + sums

    def gather_sums(self, trainer: Trainer | None) -> Tensor:
        """The sums [L, 74, 3] of all ranks, on the CPU; L is 1 without ``per_label``. A collective.

        Raises:
            InputError: There are no rows.
        """
        self._add_waiting()
        num_labels = self.num_groups_of_ranks(trainer) if self.per_label else 1
        sums = torch.zeros(num_labels, *SUMS_SHAPE, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        if trainer is not None and trainer.world_size > 1:
            sums = sum_of_ranks(sums, trainer)
        self.check_not_empty(int(sums[:, ROWS, 0].sum()))
        return sums
