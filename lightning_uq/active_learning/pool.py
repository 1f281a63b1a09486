"""The data of an active-learning experiment: what is labelled, what is not, and the order of acquisition."""

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from lightning_uq._lightning import trainer_of
from lightning_uq.active_learning.reading import pool_rows
from lightning_uq.active_learning.strategies import Strategy, as_strategy
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.running.ranks import gather_objects


class PoolDataModule(LightningDataModule):
    """A data set of which some positions are labelled: the training data. The others are the pool, from which :meth:`acquire` takes.

    It fits into ``trainer.fit(module, data)`` as any data module. Data are never copied: both parts are positions. A checkpoint of
    the Trainer holds the labelled positions in the order of their acquisition, and a training that is resumed from it continues
    with them. On several processes, all acquire the same positions.

    Args:
        dataset: Map-style data of ``(x, y)`` or of mappings. Targets of the pool are not used, so they may be placeholders that are
            replaced once a position is acquired.
        labelled: Positions that are labelled at the beginning, or their number, drawn at random; see :func:`balanced_positions`.
        val: Validation data, also for callbacks that calibrate.
        test: Test data.
        batch_size: Samples per batch.
        samples_per_epoch: Length of an epoch: the labelled samples are repeated in new orders until it is reached. So that
            trainings of all rounds have as many steps; on one process only. None: each sample once.
        num_workers: Processes of each loader.
        seed: Seed of the first positions, of the order of training samples, and of the random choices of strategies.

    Attributes:
        labelled: The labelled positions [L], in the order of their acquisition.
        initial: How many of them were labelled at the beginning.

    Raises:
        InputError: An argument is out of range, or a position is unknown or given twice.

    Example:
        >>> data = PoolDataModule(torch.utils.data.TensorDataset(torch.zeros(9, 2), torch.arange(9) // 5), labelled=[8, 0])
        >>> data.labelled.tolist(), data.pool.tolist()
        ([8, 0], [1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        labelled: int | Sequence[int] | Tensor,
        *,
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        batch_size: int = 64,
        samples_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not hasattr(dataset, "__len__"):
            raise InputError(f"`dataset` must have a length, but it is a {type(dataset).__name__}.")
        self.size = len(cast(Sized, dataset))
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_integer("seed", seed, 0)
        if samples_per_epoch is not None:
            check_integer("samples_per_epoch", samples_per_epoch, 1)
        if isinstance(labelled, int):
            if not 0 < labelled <= self.size:
                raise InputError(f"`labelled` must be in [1, {self.size}], but it is {labelled}.")
            labelled = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))[:labelled]
        self.labelled = _checked(labelled, self.size)
        self.initial = len(self.labelled)
        self.dataset, self.val, self.test = dataset, val, test
        self.batch_size, self.samples_per_epoch, self.num_workers = batch_size, samples_per_epoch, num_workers
        self.seed = seed
        # Lightning validates and tests where these hooks are overridden, and warns of an empty loader.
        if val is None:
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        if test is None:
            self.test_dataloader = super().test_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str) -> None:
        """Refuse ``samples_per_epoch`` on several processes, whose sampler Lightning replaces by one that draws each sample once.

        Raises:
            UnsupportedError: The Trainer has several processes.
        """
        if stage == "fit" and self.samples_per_epoch is not None and self.trainer and self.trainer.world_size > 1:
            raise UnsupportedError(
                f"`samples_per_epoch` works on one process only, but the Trainer has {self.trainer.world_size}. Leave it out, and "
                "raise `max_epochs` instead."
            )

    @property
    def pool(self) -> Tensor:
        """Positions that are not labelled, ascending [P]."""
        is_pool = torch.ones(self.size, dtype=torch.bool)
        is_pool[self.labelled] = False
        return is_pool.nonzero().flatten()

    def acquire(
        self,
        module: LightningModule,
        num: int,
        strategy: str | Strategy = "mutual_information",
        *,
        trainer: Trainer | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Label positions of the pool that a trained module and a strategy pick. On several processes, a collective.

        Args:
            module: The module, trained on what is labelled.
            num: Number of positions; if the pool has fewer, all of it.
            strategy: A :class:`~lightning_uq.active_learning.Strategy`, or its name: a key of
                :data:`~lightning_uq.active_learning.STRATEGIES` or of :data:`~lightning_uq.active_learning.ACQUISITION_SCORES`.
            trainer: The Trainer of the module, whose precision and processes are used; None: the one that trained it.
            batch_size: Inputs read at a time.

        Returns:
            The positions that were added to :attr:`labelled`.

        Raises:
            InputError: The pool is empty, the strategy is unknown, or the module's predictions lack what it needs.
        """
        check_integer("num", num, 1)
        check_integer("batch_size", batch_size, 1)
        strategy = as_strategy(strategy)
        pool = self.pool
        if not len(pool):
            raise InputError(f"The pool is empty: all {self.size} positions are labelled.")
        trainer = trainer_of(module) if trainer is None else trainer

        def read(dataset: Dataset[Any]) -> tuple[Tensor, ...]:
            loader = DataLoader(dataset, batch_size, num_workers=self.num_workers)
            return pool_rows(module, loader, strategy, trainer)

        rows = read(Subset(self.dataset, pool.tolist()))
        reference = None
        if strategy.reference is not None:
            is_labelled = isinstance(strategy.reference, str)
            reference = read(Subset(self.dataset, self.labelled.tolist()) if is_labelled else strategy.reference)
        # A function of seed and labels, so that a round that is repeated after a crash picks the same.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.labelled))
        chosen = strategy.choose(rows, min(num, len(pool)), reference, generator)
        (chosen, *_) = gather_objects(chosen, trainer)  # processes may round differently
        acquired = pool[chosen]
        self.label(acquired)
        return acquired

    def label(self, positions: Sequence[int] | Tensor) -> None:
        """Move positions from the pool to the labelled ones, in the order given.

        Raises:
            InputError: A position is unknown, given twice or labelled already.
        """
        self.labelled = _checked(torch.cat([self.labelled, torch.as_tensor(positions).cpu()]), self.size)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """The labelled samples, in a random order."""
        labelled = Subset(self.dataset, self.labelled.tolist())
        generator = torch.Generator().manual_seed(self.seed)
        sampler = RandomSampler(labelled, num_samples=self.samples_per_epoch, generator=generator)
        return DataLoader(labelled, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation samples; without them, Lightning validates nothing."""
        assert self.val is not None
        return DataLoader(self.val, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test samples; without them, `trainer.test` has nothing to do."""
        assert self.test is not None
        return DataLoader(self.test, self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The pool, in ascending order."""
        return DataLoader(Subset(self.dataset, self.pool.tolist()), self.batch_size, num_workers=self.num_workers)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer holds: the positions, in the order of their acquisition."""
        return {"labelled": self.labelled.tolist(), "initial": self.initial, "size": self.size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the positions of a checkpoint.

        Raises:
            InputError: They belong to a data set of another size.
        """
        if state_dict["size"] != self.size:
            raise InputError(
                f"The checkpoint belongs to a data set of {state_dict['size']} samples, but `dataset` has {self.size}."
            )
        self.labelled = _checked(state_dict["labelled"], self.size)
        self.initial = int(state_dict["initial"])


def balanced_positions(labels: Sequence[int] | Tensor, per_class: int, seed: int = 0) -> Tensor:
    """Positions of as many samples of each class, drawn at random: a start for :class:`PoolDataModule`.

    Args:
        labels: Class indices [N].
        per_class: Number of positions per class.
        seed: Seed of the draw.

    Raises:
        InputError: A class has too few samples.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
        >>> labels[balanced_positions(labels, 2)].tolist()
        [0, 0, 1, 1]
    """
    check_integer("per_class", per_class, 1)
    labels = torch.as_tensor(labels).flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in torch.unique(labels).tolist():
        found = order[labels[order] == label][:per_class]
        if len(found) < per_class:
            raise InputError(f"`per_class` is {per_class}, but class {label} has only {len(found)} samples.")
        chosen.append(found)
    return torch.cat(chosen)


def _checked(positions: Sequence[int] | Tensor, size: int) -> Tensor:
    found = torch.as_tensor(positions)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"`labelled` must hold positions, at least one, but it holds {positions!r}.")
    if not 0 <= int(found.min()) <= int(found.max()) < size or len(torch.unique(found)) < len(found):
        raise InputError(f"`labelled` must hold distinct positions in [0, {size}), but it holds other values.")
    return found.long().cpu()
