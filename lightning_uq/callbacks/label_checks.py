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
from lightning_uq.networks.positions import resized
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.ranks import gather_objects
from lightning_uq.tasks import Task

TargetOf = Callable[[Any], Any]
_CHUNK = 2**24  # labels to count at once


class SeenBatch(NamedTuple):
    """Outputs and targets of the first batch of the fitting data.

    Attributes:
        outputs: The outputs [Z, 1, ...] of one of its rows, on the CPU.
        target: Its targets [B, ...], on the CPU.
        class_axis: The axis of the classes in the outputs [B, ...] of one hypothesis, 1 or -1, if there is one label per position, so
            that batches may differ in the number of positions. None if there is one label per input.
    """

    outputs: Tensor
    target: Tensor
    class_axis: int | None = None

    @classmethod
    def of(cls, task: Task, outputs: Tensor, target: Tensor) -> "SeenBatch":
        """A batch of a task, moved to the CPU."""
        return cls(outputs.cpu(), target.cpu(), task.output_axis if task.has_positions else None)

    def outputs_for(self, target: Tensor) -> Tensor:
        """Outputs [Z, N, ...] that match the targets [N, ...] of other rows; they take no memory."""
        outputs, sizes = self.outputs, target.shape[1:]
        if self.class_axis is not None and sizes != self.target.shape[1:] and outputs.ndim == 3 + len(sizes):
            last = outputs.ndim - 1 if self.class_axis == -1 else 2  # the axis of the classes
            for axis, size in zip([i for i in range(2, outputs.ndim) if i != last], sizes, strict=True):
                outputs = outputs.narrow(axis, 0, 1)  # one position stands for all
                outputs = outputs.expand(*outputs.shape[:axis], size, *outputs.shape[axis + 1 :])
        return outputs.expand(-1, len(target), *outputs.shape[2:])

    def is_alike(self, target: Any) -> bool:
        """Whether another batch's targets are of the same kind. Targets mixed by Mixup or CutMix for the training are not."""
        if not isinstance(target, Tensor) or target.dtype != self.target.dtype:
            return False
        if self.class_axis is not None and target.ndim == self.target.ndim > 1:  # maps or sentences of any size
            return True
        return target.shape[1:] == self.target.shape[1:]


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
    """The number of rows of each class, as far as targets show it.

    Args:
        grids: The grid of the labels of a map and that of its features, if they are at positions; None if they are not.
    """

    def __init__(self, grids: tuple[torch.Size, torch.Size] | None = None) -> None:
        self.grids = grids
        self._counts = torch.zeros(0, dtype=torch.long)
        self._ignored: int | None = None

    def see(self, labels: Tensor | None, features: Tensor) -> None:
        """Record the grids of the labels [B, *P] and of the features [M, B, D, *P] of a batch."""
        self.grids = None if labels is None or features.ndim == 3 else (labels.shape[1:], features.shape[3:])

    def note(self, task: Task, target: Tensor, num_classes: int) -> None:
        """Count the rows of each class in targets [N, ...]; those with probabilities, or with an unknown grid of features, are left out."""
        self._ignored = task.ignored_label
        labels = target.squeeze(1) if target.shape[1:] == (1,) and not task.has_positions else target
        grid = self._grid_for(labels.shape[1:])
        if grid is None or labels.is_floating_point():
            return
        for part in torch.split(labels, max(1, _CHUNK // max(1, labels[:1].numel()))):
            part = resized(part, grid)
            positions = task.row_positions(part)
            counted = part.reshape(-1) if positions is None else part.reshape(-1)[positions]
            counts = counted.long().bincount(minlength=max(num_classes, len(self._counts)))
            self._counts = torch.nn.functional.pad(self._counts, (0, len(counts) - len(self._counts))) + counts

    def check(self) -> None:
        """Raise an :class:`InputError` if a class has fewer than two of the counted rows. Without rows, nothing is known."""
        if bool(self._counts.any()):
            check_class_counts(self._counts, self._ignored)

    def review(self, trainer: Trainer, who: str) -> None:
        """Warn on all ranks about a class with fewer than two rows. The fit may see more rows than the epoch. A collective."""
        parts = gather_objects((self._counts, self._ignored), trainer)
        self._counts = torch.nn.utils.rnn.pad_sequence([counts for counts, _ in parts], batch_first=True).sum(0)
        self._ignored = next((ignored for _, ignored in parts if ignored is not None), None)
        try:
            self.check()
        except InputError as error:
            rank_zero_warn(
                f"{who} will fail after the training, unless its fitting data have more rows than the first epoch. {error}"
            )

    def _grid_for(self, shape: torch.Size) -> torch.Size | None:
        """The grid of the features for labels of a shape; None if it is unknown."""
        if self.grids is None:
            return None if shape else shape
        of_labels, of_features = self.grids
        if shape == of_labels:
            return of_features
        return shape if of_labels == of_features and len(shape) == len(of_labels) else None


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
