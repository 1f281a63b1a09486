"""What the ranks of a training tell each other: their rows, and their errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import UQError


def gather_rows(rows: Tensor, trainer: Trainer | None = None) -> Tensor:
    """Every rank's rows [n_r, ...], one rank's after the other's in turn: as :func:`exact_loader` shares them. A collective."""
    if trainer is None or trainer.world_size == 1:
        return rows
    parts = gather_all_tensors(rows)
    turn = [torch.arange(len(part), device=rows.device) * len(parts) + rank for rank, part in enumerate(parts)]
    return torch.cat(parts)[torch.cat(turn).argsort()]


@contextmanager
def together(trainer: Trainer | None = None) -> Iterator[None]:
    """An error in the body on one rank is raised on all of them, with one text. The body must hold no collective."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, trainer)


def raise_together(error: Exception | None, trainer: Trainer | None = None) -> None:
    """Raise the first rank's error on every rank; none where no rank has one. A collective."""
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
