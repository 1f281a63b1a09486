"""Communication between the ranks of a training: their rows and their errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import UQError

_T = TypeVar("_T")


class Ranks(Protocol):
    """An object that knows the number of parallel processes: a Trainer, or :class:`ProcessGroup`."""

    @property
    def world_size(self) -> int:
        """The number of processes."""


class ProcessGroup:
    """The processes of ``torch.distributed`` without a Trainer, or only this process if it is not initialized.

    Example:
        >>> ProcessGroup().rank, ProcessGroup().world_size
        (0, 1)
    """

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return torch.distributed.get_rank() if self._is_joined() else 0

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size() if self._is_joined() else 1

    @staticmethod
    def _is_joined() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_rows(rows: Tensor, trainer: Trainer | None = None) -> Tensor:
    """Rows of all ranks, interleaved: rank 0's first row, rank 1's first row, ..., the order of :func:`exact_loader`. A collective."""
    if trainer is None or trainer.world_size == 1:
        return rows
    parts = gather_all_tensors(rows)
    turn = [torch.arange(len(part), device=rows.device) * len(parts) + rank for rank, part in enumerate(parts)]
    return torch.cat(parts)[torch.cat(turn).argsort()]


def gather_objects(own: _T, trainer: Ranks | None = None) -> list[_T]:
    """One picklable object per rank, in the order of the ranks. A collective."""
    if trainer is None or trainer.world_size == 1:
        return [own]
    of_ranks: list[_T] = [own] * trainer.world_size
    torch.distributed.all_gather_object(of_ranks, own)
    return of_ranks


def sum_of_ranks(tensor: Tensor, trainer: Trainer) -> Tensor:
    """The sum of all ranks' tensors, which have the same shape, on the tensor's device. A collective."""
    moved = tensor.to(trainer.strategy.root_device)
    torch.distributed.all_reduce(moved)
    return moved.to(tensor.device)


def first_of_ranks(own: Sequence[_T | None], trainer: Ranks | None = None) -> list[_T | None]:
    """For each entry, the value of the first rank that has one, in lists of equal length. A collective."""
    return [
        next((one for one in of_ranks if one is not None), None)
        for of_ranks in zip(*gather_objects(own, trainer), strict=True)
    ]


@contextmanager
def raising_on_all_ranks(trainer: Ranks | None = None) -> Iterator[None]:
    """If any rank raises in the body, raise the error with the same text on all ranks. The body must not contain a collective."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, trainer)


def raise_on_all_ranks(error: Exception | None, trainer: Ranks | None = None) -> None:
    """Raise the first rank's error on every rank, if any rank has one. A collective."""
    if trainer is None or trainer.world_size == 1:
        if error is not None:
            raise error
        return
    kind = type(error) if isinstance(error, UQError) else RuntimeError
    text = str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"
    (first,) = first_of_ranks([None if error is None else (kind, text)], trainer)
    if first is not None:
        raise first[0](first[1]) from error
