"""What the ranks of a training tell each other: their rows, and their errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import UQError


def gather_rows(rows: Tensor, trainer: Trainer | None = None) -> Tensor:
    """Rows of all ranks, interleaved: rank 0's first, rank 1's first, ..., as :func:`exact_loader` shares them. A collective."""
    if trainer is None or trainer.world_size == 1:
        return rows
    parts = gather_all_tensors(rows)
    turn = [torch.arange(len(part), device=rows.device) * len(parts) + rank for rank, part in enumerate(parts)]
    return torch.cat(parts)[torch.cat(turn).argsort()]


@contextmanager
def raising_on_all_ranks(trainer: Trainer | None = None) -> Iterator[None]:
    """Raise an error of the body on all ranks, with the same text, if any rank has one. The body must hold no collective."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, trainer)


def raise_on_all_ranks(error: Exception | None, trainer: Trainer | None = None) -> None:
    """Raise the first rank's error on every rank, if any rank has one. A collective."""
    if trainer is None or trainer.world_size == 1:
        if error is not None:
            raise error
        return
    kind = type(error) if isinstance(error, UQError) else RuntimeError
    text = str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"
    errors: list[tuple[type[Exception], str] | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(errors, None if error is None else (kind, text))
    for first in errors:
        if first is not None:
            raise first[0](first[1]) from error
