"""Reads a user's data loader exactly: every row once, in order, divided among the ranks without padding."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_uq._lightning import training_source, users_sampler, validation_source
from lightning_uq.errors import InputError


def check_loader(loader: Any, name: str) -> None:
    """Reject an object that is not a data loader, or that can be read only once.

    Raises:
        InputError: ``loader`` is neither a DataLoader nor a re-iterable of batches; the message begins with ``name``.
    """
    hint = ""
    if isinstance(loader, Dataset):
        hint = "; wrap the data set in a DataLoader"
    elif isinstance(loader, Iterator):
        hint = ", which can be read only once; pass a DataLoader or a list of batches"
    elif isinstance(loader, Iterable) and not isinstance(loader, Tensor | Mapping | str | bytes):
        return
    raise InputError(
        f"{name[0].upper()}{name[1:]} must be a DataLoader or an iterable of batches, but its type is {type(loader).__name__}{hint}."
    )


def exact_loader(
    loader: Any, trainer: Trainer | None = None, *, name: str = "loader", limit: int | float | None = None
) -> Iterable[Any]:
    """The loader's batches without ``drop_last``, shuffling and padding; rank r of R gets rows r, r + R, r + 2R, ...

    Shuffling and distributed samplers become sequential. Any other sampler keeps its own rows, such as a subset. A custom
    batch sampler keeps its batches, which are divided among the ranks. A list of batches is
    also divided batch by batch. An iterable data set, or a DataLoader with its own iteration, is read unchanged on every
    rank, with a warning if there are several ranks, because only its author can divide it.

    Args:
        loader: A loader that :func:`check_loader` accepts.
        trainer: Its ranks share the rows; None gives this process all rows. A collective with a random sampler.
        name: Name of the loader, for messages.
        limit: Maximum number of batches per rank (int), or fraction (float, at least one batch), as in ``limit_test_batches``.

    Raises:
        InputError: See :func:`check_loader`; also for a fractional limit on a loader without a length.
    """
    check_loader(loader, name)
    rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    if isinstance(loader, Sequence):
        mine = loader[rank::world]
        return mine[: _count(len(mine), limit)]
    if not _can_be_rebuilt(loader):
        if world > 1:
            rank_zero_warn(
                f"Each of the {world} ranks reads {name} unchanged ({type(loader).__name__} over an iterable data set, or "
                "with its own iteration), so rows that it does not divide by rank count several times."
            )
        return Stream(loader, limit, name)
    kwargs = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    # Without the user's generator, which iterating would advance.
    batch_sampler = loader.batch_sampler
    own = batch_sampler is not None and type(batch_sampler) is not BatchSampler
    items = (
        _batches_of(batch_sampler)
        if own
        else _rows_of(loader.sampler if batch_sampler is None else batch_sampler.sampler)
    )
    if world > 1 and not isinstance(items, range):
        items = trainer.strategy.broadcast(items)  # type: ignore[union-attr]  # a random sampler's draws differ by rank
    items = items[rank::world]
    if own:
        return DataLoader(loader.dataset, batch_sampler=items[: _count(len(items), limit)], **kwargs)
    per_batch = None if batch_sampler is None else batch_sampler.batch_size
    if limit is not None:
        items = items[: _count(-(-len(items) // (per_batch or 1)), limit) * (per_batch or 1)]
    return DataLoader(loader.dataset, batch_size=per_batch, sampler=items, **kwargs)


def training_loader(trainer: Trainer) -> Any:
    """The Trainer's training loader (or a nest of them), also before the training begins."""
    loader = trainer.train_dataloader
    return training_source(trainer).dataloader() if loader is None else loader


def fit_dataloader_of(data: Any) -> Callable[[], Any] | None:
    """A data module's ``uq_fit_dataloader``, which returns the data for fits after training; None without one."""
    provider: Callable[[], Any] | None = getattr(data, "uq_fit_dataloader", None)
    return provider


def num_training_samples(trainer: Trainer) -> int:
    """The number of samples in the Trainer's training data.

    Raises:
        InputError: The data set has no length, or there are several loaders.
    """
    try:
        return len(training_loader(trainer).dataset)
    except (AttributeError, TypeError) as error:
        raise InputError(f"The training data have no length ({error}). Pass `num_train`.") from error


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders of the Trainer's training, also before it begins."""
    loaders = trainer.val_dataloaders
    source = validation_source(trainer)
    if loaders is None and trainer.limit_val_batches and source.is_defined():
        loaders = source.dataloader()
    return loader_list(loaders)


def reads_same_data(one: Any, other: Any) -> bool:
    """Whether two loaders are the same, or read the same data set, unless their samplers have disjoint lists of indices."""
    data = getattr(one, "dataset", one)
    if one is other or data is None or data is not getattr(other, "dataset", None):
        return one is other
    own, others = _indices(one), _indices(other)
    return own is None or others is None or not own.isdisjoint(others)


def loader_list(loaders: Any) -> list[Any]:
    """A Trainer's ``val_dataloaders``, ``test_dataloaders`` or ``predict_dataloaders`` as a list."""
    return [loader for loader in tree_leaves(loaders) if loader is not None]


def can_be_reread(loader: Any) -> bool:
    """Whether reading a loader leaves it unchanged for the next reader."""
    return isinstance(loader, Sequence) or _can_be_rebuilt(loader)


def _can_be_rebuilt(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
    )


def _indices(loader: Any) -> set[int] | None:
    """The rows of a loader whose sampler has a list of indices, or None."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        sampler = users_sampler(sampler)
    return set(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else None


def _rows_of(sampler: Any) -> Sequence[Any]:
    """The rows of a sampler, in order and without padding."""
    if isinstance(sampler, DistributedSampler):
        users = users_sampler(sampler)
        if users is not None:
            return _rows_of(users)
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SequentialSampler):
        return range(len(sampler.data_source))
    if isinstance(sampler, RandomSampler) and sampler.num_samples >= len(sampler.data_source):
        return range(len(sampler.data_source))
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    return _drawn(sampler)


def _batches_of(batch_sampler: Any) -> list[Any]:
    """All batches of a custom batch sampler. If it uses a sampler, its rows have no padding."""
    batch_sampler = copy(batch_sampler)
    if hasattr(batch_sampler, "drop_last"):
        batch_sampler.drop_last = False
    if isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler):
        batch_sampler.sampler = _rows_of(batch_sampler.sampler)
    return _drawn(batch_sampler)


def _drawn(sampler: Any) -> list[Any]:
    """One pass over a sampler that does not advance its generator."""
    generator = getattr(sampler, "generator", None)
    if generator is None:
        return list(sampler)
    state = generator.get_state()
    try:
        return list(sampler)
    finally:
        generator.set_state(state)


def _count(length: int, limit: int | float | None) -> int:
    if limit is None:
        return length
    return min(length, limit) if isinstance(limit, int) else min(length, max(1, int(length * limit)))


class Stream:
    """The first batches of a loader that is read unchanged.

    Args:
        loader: The loader.
        limit: See :func:`exact_loader`.
        name: Name of the loader, for messages.

    Attributes:
        stop: Number of batches; None: all.
    """

    def __init__(self, loader: Iterable[Any], limit: int | float | None, name: str) -> None:
        self.loader = loader
        self.stop: int | None = None
        if isinstance(limit, float) and limit < 1:
            try:
                self.stop = _count(len(loader), limit)  # type: ignore[arg-type]
            except TypeError:
                raise InputError(
                    f"{name} has no length, so a limit on its batches (such as `limit_test_batches`) must be an integer, but it "
                    f"is {limit}."
                ) from None
        elif isinstance(limit, int):
            self.stop = limit

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.stop)
