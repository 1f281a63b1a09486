"""Checks the labels of a fit before the training or in its first epoch, rather than after it."""

from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import chain
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_uq.data.indexed import Indexed
from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import check_class_counts
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.ranks import gather_objects

TargetOf = Callable[[Any], Any]


class SeenBatch(NamedTuple):
    """Outputs and targets of the first batch of the fitting data.

    Attributes:
        outputs: The outputs [Z, 1, ...] of one of its rows, on the CPU.
        target: Its targets [B, ...], on the CPU.
    """

    outputs: Tensor
    target: Tensor

    def outputs_for(self, target: Tensor) -> Tensor:
        """Outputs [Z, N, ...] that match the targets [N, ...] of other rows; they take no memory."""
        return self.outputs.expand(-1, len(target), *self.outputs.shape[2:])

    def is_alike(self, target: Any) -> bool:
        """Whether another batch's targets are of the same kind. Targets mixed by Mixup or CutMix for the training are not."""
        same = isinstance(target, Tensor) and target.dtype == self.target.dtype
        return same and target.shape[1:] == self.target.shape[1:]


def all_targets(
    loader: Any, seen: SeenBatch, target_of: TargetOf, limit: int | float | None, *, read: bool
) -> Tensor | None:
    """The targets [N, ...] of every row that a fit reads; None if only a pass over the data would show them.

    They come from a list of batches, or from a data set that holds them: a ``TensorDataset``, a data set with ``targets`` or
    ``labels``, a list of pairs, or a ``Subset``, an ``Indexed`` or a chain of these. They are used only if they agree with the first batch,
    so that a data set that changes its targets is not misread.

    Args:
        loader: The fitting data.
        seen: Its first batch.
        target_of: Returns the target of a batch.
        limit: The limit on the number of batches.
        read: Whether to read the data if there is no other way.
    """
    exact = exact_loader(loader, limit=limit)
    if isinstance(exact, Sequence):
        return _joined(exact, target_of)
    if isinstance(exact, DataLoader):
        held = _held_targets(exact.dataset)
        if held is not None:
            # A custom batch sampler yields one list of rows per batch.
            own = exact.batch_size is None and exact.batch_sampler is not None
            indices = list(chain(*exact.batch_sampler) if own else exact.sampler)  # type: ignore[misc]
            found = _at(held, indices)
            if found is not None and seen.is_alike(found) and torch.equal(found[: len(seen.target)], seen.target):
                return found
    return _joined(exact, target_of) if read else None


class ClassCounts:
    """The number of rows of each class in the first epoch."""

    def __init__(self) -> None:
        self._counts = torch.zeros(0, dtype=torch.long)

    def note(self, target: Tensor, num_classes: int) -> None:
        """Count the rows of each class in a batch's targets."""
        counts = class_counts(target, max(num_classes, len(self._counts)))
        if counts is not None:
            self._counts = torch.nn.functional.pad(self._counts, (0, len(counts) - len(self._counts))) + counts

    def review(self, trainer: Trainer, who: str) -> None:
        """Warn on all ranks about a class with fewer than two rows. The fit may see more rows than the epoch. A collective."""
        parts = gather_objects(self._counts, trainer)
        counts = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).sum(0)
        if not bool(counts.any()):
            return
        try:
            check_class_counts(counts)
        except InputError as error:
            rank_zero_warn(
                f"{who} will fail after the training, unless its fitting data have more rows than the first epoch. {error}"
            )


def class_counts(target: Tensor, num_classes: int) -> Tensor | None:
    """The number of rows [C] of each class; None for labels of positions and for probabilities."""
    labels = target.squeeze(1) if target.shape[1:] == (1,) else target
    return None if labels.ndim != 1 or labels.is_floating_point() else labels.long().bincount(minlength=num_classes)


def _joined(batches: Iterable[Any], target_of: TargetOf) -> Tensor | None:
    targets = [target_of(batch) for batch in batches]
    if not targets or not all(isinstance(y, Tensor) and y.shape[1:] == targets[0].shape[1:] for y in targets):
        return None
    return torch.cat([y.cpu() for y in targets])


def _at(held: Tensor, indices: list[Any]) -> Tensor | None:
    try:
        return held.cpu()[torch.tensor(indices)]
    except (IndexError, TypeError, ValueError):  # keys of another kind, or another length
        return None


def _held_targets(dataset: Any) -> Tensor | None:
    """The targets of all items of a data set that stores them, or None."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    if isinstance(dataset, ConcatDataset):
        parts = [_held_targets(part) for part in dataset.datasets]
        return torch.cat([part for part in parts if part is not None]) if all(p is not None for p in parts) else None
    if isinstance(dataset, list | tuple):
        return _as_tensor([item[1] for item in dataset if isinstance(item, list | tuple) and len(item) > 1])
    if isinstance(dataset, Subset | Indexed):  # any other wrapper may filter or change the items
        held = _held_targets(dataset.dataset)
        return _at(held, list(dataset.indices)) if isinstance(dataset, Subset) and held is not None else held
    for name in ("targets", "labels"):
        found = _as_tensor(getattr(dataset, name, None))
        if found is not None and found.ndim and isinstance(dataset, Sized) and len(found) == len(dataset):
            return found
    return None


def _as_tensor(values: Any) -> Tensor | None:
    if isinstance(values, list) and values and all(isinstance(value, Tensor) for value in values):
        values = torch.stack(values) if all(value.shape == values[0].shape for value in values) else None
    try:
        return None if values is None or callable(values) else torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):  # targets that are names or objects
        return None
