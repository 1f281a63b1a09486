"""Keeps scores of rows while batches pass by: all of them up to a limit, or else a random sample."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_uq.running.ranks import first_of_ranks, gather_objects
from lightning_uq.running.row_sample import RowSample, row_keys


class KeptRows:
    """Scores of at most ``max_rows`` rows. The choice of rows depends only on their positions, and not on batches or ranks.

    Args:
        max_rows: The largest number of rows.

    Example:
        >>> kept = KeptRows(max_rows=3)
        >>> kept.add(torch.tensor([1, 0]), {"nll": torch.tensor([0.1, 0.2])})
        >>> kept.gather(None, "The example")
        (tensor([0, 1]), {'nll': tensor([0.2000, 0.1000])}, 2)
    """

    def __init__(self, max_rows: int) -> None:
        self._sample = RowSample(max_rows)
        self._names: list[str] | None = None

    @property
    def num_seen(self) -> int:
        """The number of rows that this process has seen."""
        return self._sample.num_seen

    def add(self, positions: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch.

        Args:
            positions: Positions [B] in the data.
            scores: Scores [B, ...] on the CPU by name, the same names for all batches.
        """
        self._names = sorted(scores)
        keys = row_keys(positions)
        chosen = self._sample.choose(keys)
        rows = [positions, *(scores[name] for name in self._names)]
        self._sample.add(keys[chosen], *(one[chosen] for one in rows))

    def gather(self, trainer: Trainer | None, who: str) -> tuple[Tensor, dict[str, Tensor], int]:
        """Positions [N] and scores [N, ...] of the kept rows of all ranks in the order of the positions, and the number of rows seen. A collective.

        Args:
            trainer: Its ranks are gathered; None for only this process.
            who: The owner of the data, for the message about a sample.
        """
        names = first_of_ranks([self._names], trainer)[0] or []
        num_seen = sum(gather_objects(self._sample.num_seen, trainer))
        gathered = [one.cpu() for one in self._sample.gather(trainer, who)]
        if not gathered:
            return torch.empty(0, dtype=torch.long), {}, 0
        order = gathered[0].argsort(stable=True)
        return gathered[0][order], dict(zip(names, (one[order] for one in gathered[1:]), strict=True)), num_seen
