"""A random sample of rows that fits into memory, the same in any batches and on any number of ranks."""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_uq.functional.hashing import GOLDEN, chain, chain_last, mix, signed
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.ranks import gather_rows
from lightning_uq.tasks import Task

MAX_ROWS = 2**20
"""Rows that a calibration reads by default. The standard error of a temperature at a million rows is a thousandth."""

_SEED = chain(0)


class RowSample:
    """Logits and labels of at most ``max_rows`` rows, in order of arrival.

    Every row has a key, a hash of its sample's number and of its position in the sample; the rows with the smallest keys are
    kept. So a row is kept or not whatever the batches and the ranks are, and up to ``max_rows`` rows are kept one and all.

    Args:
        max_rows: The largest number of rows; None keeps all.

    Raises:
        InputError: ``max_rows`` is no integer of at least 1.

    Example:
        >>> sample = RowSample(max_rows=2)
        >>> for numbers in torch.arange(6).split(3):
        ...     keys = row_keys(numbers)
        ...     chosen = sample.choose(keys)
        ...     sample.add(keys[chosen], numbers[chosen, None, None].double(), numbers[chosen])
        >>> sample.gather(None, "The example")[1]
        tensor([0, 2])
    """

    def __init__(self, max_rows: int | None = MAX_ROWS) -> None:
        if max_rows is not None:
            check_integer("max_rows", max_rows, 1)
        self.max_rows = max_rows
        self.num_seen = 0
        self._parts: list[_Part] = []

    @property
    def is_empty(self) -> bool:
        """Whether no row was added yet."""
        return not self._parts

    def choose(self, keys: Tensor) -> Tensor | slice:
        """Which rows of a batch, with keys [N] on the CPU, may be among those that are kept: the others need no more work."""
        self.num_seen += len(keys)
        largest = self._largest([*(part.keys for part in self._parts), keys])
        return slice(None) if largest is None else (keys <= largest).nonzero().squeeze(1)

    def add(self, keys: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Keep the rows of a batch that :meth:`choose` chose: logits [N, Z, C] and labels [N]."""
        self._parts.append(_Part(keys, logits, labels.long()))
        if self.max_rows is not None and sum(len(part.keys) for part in self._parts) > 2 * self.max_rows:
            self._forget(self._largest([part.keys for part in self._parts]))

    def gather(self, trainer: Trainer | None, who: str) -> tuple[Tensor, Tensor]:
        """Logits [N, Z, C] and labels [N] of all ranks; a rank without any learns the shape from the others. A collective.

        Args:
            trainer: Its ranks are gathered; None for this process alone.
            who: Whose data they are, for the line that tells of a sample.
        """
        device = None if trainer is None or trainer.world_size == 1 else trainer.strategy.root_device
        self._forget(self._largest([part.keys for part in self._parts]))
        num_seen = self.num_seen
        if device is not None:
            keys = torch.cat([torch.empty(0, dtype=torch.long), *(part.keys for part in self._parts)])
            self._forget(self._largest([gather_rows(keys.to(device), trainer).cpu()]))
            num_seen = int(gather_rows(torch.tensor([num_seen], device=device), trainer).sum())
        if self.max_rows is not None and num_seen > self.max_rows:
            rank_zero_info(f"{who} reads a random sample of {self.max_rows:,} of {num_seen:,} rows (`max_rows`).")
        parts = self._parts
        logits = torch.cat([part.logits for part in parts]) if parts else torch.empty(0, 0, 0, dtype=torch.float64)
        labels = torch.cat([part.labels for part in parts]) if parts else torch.empty(0, dtype=torch.long)
        if device is None:
            return logits, labels
        shapes = gather_rows(torch.tensor([logits.shape[1:]], device=device), trainer)
        logits = logits.reshape(len(logits), *shapes.amax(0).tolist())
        return gather_rows(logits.to(device, wide_dtype(device)), trainer), gather_rows(labels.to(device), trainer)

    def _largest(self, keys: list[Tensor]) -> Tensor | None:
        """The largest of these keys that is kept; None if all of them are."""
        if self.max_rows is None or sum(map(len, keys)) <= self.max_rows:
            return None
        return torch.kthvalue(torch.cat(keys), self.max_rows).values

    def _forget(self, largest: Tensor | None) -> None:
        """Forget the rows with larger keys."""
        if largest is not None:
            self._parts = [part.up_to(largest) for part in self._parts]


class _Part(NamedTuple):
    """Some rows: their keys [N] on the CPU, logits [N, Z, C] and labels [N]."""

    keys: Tensor
    logits: Tensor
    labels: Tensor

    def up_to(self, largest: Tensor) -> "_Part":
        """The rows whose keys are not larger."""
        kept = (self.keys <= largest).nonzero().squeeze(1)
        return _Part(self.keys[kept], *(rows[kept.to(rows.device)] for rows in (self.logits, self.labels)))


def row_keys(samples: Tensor, positions: Tensor | int = 0) -> Tensor:
    """The key [N] of each row, on the CPU: a hash of its sample's number and of its position inside it."""
    return mix(chain_last(_SEED, samples) + positions * signed(GOLDEN)).cpu()


def keys_of(task: Task, target: Tensor, samples: Tensor) -> Tensor:
    """The keys of the rows that ``task.rows`` makes of the targets [B, ...] of samples with these numbers [B]."""
    samples = samples.to(target.device)
    positions = task.row_positions(target)
    if positions is None:
        return row_keys(samples)
    per_sample = target[:1].numel() or 1
    return row_keys(samples[positions // per_sample], positions % per_sample)
