"""A random sample of rows that fits into memory and does not depend on the batches and the number of ranks."""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_uq.functional.hashing import GOLDEN, chain, chain_last, mix, signed
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.ranks import first_of_ranks, gather_rows
from lightning_uq.tasks import Task

MAX_ROWS = 2**20
"""Default number of rows for a calibration. With a million rows, the standard error of a temperature is about 0.001."""

_SMALL = 2**14
"""Parts of at most this number of rows are joined."""

_SEED = chain(0)


class RowSample:
    """At most ``max_rows`` rows, each of one or several tensors, such as its logits and its label, in order of arrival.

    Every row has a key, a hash of its sample's number and its position in the sample. The rows with the smallest keys are
    kept, so the sample does not depend on batches or ranks. Up to ``max_rows`` rows, all are kept.

    Args:
        max_rows: The largest number of rows; None keeps all.

    Raises:
        InputError: ``max_rows`` is not an integer of at least 1.

    Example:
        >>> sample = RowSample(max_rows=2)
        >>> for numbers in torch.arange(6).split(3):
        ...     keys = row_keys(numbers)
        ...     chosen = sample.choose(keys)
        ...     sample.add(keys[chosen], numbers[chosen])
        >>> sample.gather(None, "The example")
        (tensor([0, 2]),)
    """

    def __init__(self, max_rows: int | None = MAX_ROWS) -> None:
        if max_rows is not None:
            check_integer("max_rows", max_rows, 1)
        self.max_rows = max_rows
        self.num_seen = 0
        self._parts: list[Part] = []

    @property
    def is_empty(self) -> bool:
        """Whether no row was added."""
        return not self._parts

    def choose(self, keys: Tensor) -> Tensor | slice:
        """The rows of a batch, with keys [N] on the CPU, that may be kept. The others need no further work."""
        self.num_seen += len(keys)
        largest = self._largest([*(part.keys for part in self._parts), keys])
        return slice(None) if largest is None else (keys <= largest).nonzero().squeeze(1)

    def add(self, keys: Tensor, *rows: Tensor) -> None:
        """Keep the rows of a batch that :meth:`choose` selected: their keys [N] on the CPU, and tensors [N, ...]."""
        if len(keys) or self.is_empty:  # a part without rows only tells the shapes
            self._append(Part(keys, rows))
        if self.max_rows is not None and sum(len(part.keys) for part in self._parts) > 2 * self.max_rows:
            self._forget(self._largest([part.keys for part in self._parts]))

    def gather(self, trainer: Trainer | None, who: str) -> tuple[Tensor, ...]:
        """The tensors [N, ...] of all ranks; a rank without rows gets their kind from the others. A collective.

        Args:
            trainer: Its ranks are gathered; None for only this process.
            who: The owner of the data, for the message about a sample.

        Returns:
            One tensor per added tensor, or none if no rank added any.
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
        own = [torch.cat(rows) for rows in zip(*(part.rows for part in self._parts), strict=True)]
        if device is None:
            return tuple(own)
        kinds = first_of_ranks([[(rows.shape[1:], rows.dtype) for rows in own] if own else None], trainer)[0] or []
        own = own or [torch.empty(0, *shape, dtype=dtype) for shape, dtype in kinds]
        moved = [t.to(device, wide_dtype(device) if t.dtype == torch.float64 else t.dtype) for t in own]
        return tuple(gather_rows(rows, trainer) for rows in moved)

    def _append(self, part: "Part") -> None:
        """Add a part, and join small ones: of a long stream, a batch adds few rows or none, so there would be as many parts as batches."""
        self._parts.append(part)
        while len(self._parts) > 1 and len(self._parts[-2].keys) <= 2 * len(self._parts[-1].keys) <= _SMALL:
            last = self._parts.pop()
            self._parts[-1] = self._parts[-1].joined(last)

    def _largest(self, keys: list[Tensor]) -> Tensor | None:
        """The largest of these keys that is kept; None if all are."""
        if self.max_rows is None or sum(map(len, keys)) <= self.max_rows:
            return None
        return torch.kthvalue(torch.cat(keys), self.max_rows).values

    def _forget(self, largest: Tensor | None) -> None:
        """Drop the rows with larger keys."""
        if largest is not None:
            parts, self._parts = self._parts, []
            for part in parts:
                self._append(part.up_to(largest))


class Part(NamedTuple):
    """Some rows: their keys [N] on the CPU, and tensors [N, ...]."""

    keys: Tensor
    rows: tuple[Tensor, ...]

    def up_to(self, largest: Tensor) -> "Part":
        """The rows whose keys are at most ``largest``."""
        kept = (self.keys <= largest).nonzero().squeeze(1)
        return Part(self.keys[kept], tuple(rows[kept.to(rows.device)] for rows in self.rows))

    def joined(self, later: "Part") -> "Part":
        """The rows of both parts."""
        rows = tuple(torch.cat(pair) for pair in zip(self.rows, later.rows, strict=True))
        return Part(torch.cat([self.keys, later.keys]), rows)


def row_keys(samples: Tensor, positions: Tensor | int = 0) -> Tensor:
    """The key [N] of each row, on the CPU: a hash of its sample's number and its position in the sample."""
    return mix(chain_last(_SEED, samples) + positions * signed(GOLDEN)).cpu()


def keys_of(task: Task, target: Tensor, samples: Tensor) -> Tensor:
    """The keys of the rows that ``task.rows`` makes from the targets [B, ...] of samples with these numbers [B]."""
    samples = samples.to(target.device)
    positions = task.row_positions(target)
    if positions is None:
        return row_keys(samples)
    per_sample = target[:1].numel() or 1
    return row_keys(samples[positions // per_sample], positions % per_sample)


def keys_of_positions(task: Task, target: Tensor, samples: Tensor, num_rows: int) -> Tensor:
    """Like :func:`keys_of`, for a task with ``num_rows`` positions in total, also if all of them count."""
    if task.row_positions(target) is not None:
        return keys_of(task, target, samples)
    positions, per_sample = torch.arange(num_rows), max(1, num_rows // max(1, len(samples)))
    return row_keys(samples[positions // per_sample], positions % per_sample)
