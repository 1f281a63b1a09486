"""Reads the predictions of any module: its batches, its outputs, and the samples for timing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_uq import batches
from lightning_uq.callbacks.foreign import unwrap_predict_step, wrap_predict_step
from lightning_uq.data.interface import TaskData
from lightning_uq.lightning_trees import in_tree_of, is_instance
from lightning_uq.method import Reading
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.running.foreign_data import HOOKS, is_overridden
from lightning_uq.running.logits import LogitReader


def logit_reader(reading: Reading) -> LogitReader:
    """A reader of a module's outputs."""
    return LogitReader(**reading.arguments, infers_task=False)


class ReadPredictions(Callback):
    """Makes ``trainer.predict`` return this package's predictions for a foreign module, without any fit."""

    def __init__(self, reading: Reading) -> None:
        self.reader = logit_reader(reading)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the module's ``predict_step``."""
        wrap_predict_step(pl_module, self.reader, None)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the module's own ``predict_step``."""
        unwrap_predict_step(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's own ``predict_step``."""
        unwrap_predict_step(pl_module)


@contextmanager
def reading_predictions(module: LightningModule, reading: Reading | None) -> Iterator[None]:
    """A context in which ``predict_step`` returns predictions of this package, like :class:`ReadPredictions`; None changes nothing."""
    if reading is not None:
        wrap_predict_step(module, logit_reader(reading), None)
    try:
        yield
    finally:
        unwrap_predict_step(module)


def target_of(batch: Any, module: LightningModule, reading: Reading | None) -> Tensor | None:
    """The target of a batch, as unpacked by the module that predicts it."""
    if reading is not None:
        return logit_reader(reading).unpack(module, batch)[1]
    unpack = module.unpack_batch if isinstance(module, UncertaintyModule) else batches.unpack_batch
    found: Tensor | None = unpack(batch)[1]
    return found


class Loader(LightningDataModule):
    """One loader of a data module, for a prediction with the data module's batch hooks.

    Args:
        data: The data module.
        loader: One of its loaders.
    """

    def __init__(self, data: Any, loader: Any) -> None:
        super().__init__()
        self.data = data
        self.loader = loader
        # Lightning checks which hooks are overridden, and a data module's hook takes precedence over the module's own.
        for hook in HOOKS:
            if is_overridden(data, hook):
                setattr(self, hook, getattr(data, hook))

    def predict_dataloader(self) -> Any:
        """The loader."""
        self.data.trainer = self.trainer  # a hook may use the Trainer's state
        return self.loader


def data_for(module: LightningModule, data: LightningDataModule | TaskData) -> Any:
    """A data module in the class tree of Lightning to which the module belongs, so that its Trainer accepts it."""
    base: Any = in_tree_of(module, LightningDataModule)
    if isinstance(data, base):
        return data
    twin = base()
    names = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", "uq_fit_dataloader")
    for name in (*names, *HOOKS):
        if name == "uq_fit_dataloader" or is_overridden(data, name):
            found = getattr(data, name, None)
            if found is not None:
                setattr(twin, name, found)
    return twin


def rows_repeated(seen: Sequence[Any], num: int) -> Any:
    """One batch of ``num`` rows from batches with tensors [B, ...] in plain containers, repeated from the first row on.

    Raises:
        TypeError: A batch contains another type.

    Example:
        >>> rows_repeated([(torch.tensor([1, 2]), ["a", "b"]), (torch.tensor([3]), ["c"])], 4)
        (tensor([1, 2, 3, 1]), ['a', 'b', 'c', 'a'])
    """
    first = seen[0]
    if isinstance(first, Tensor):
        whole = torch.cat(list(seen))
        return whole[torch.arange(num, device=whole.device) % len(whole)]
    if isinstance(first, Mapping):
        return {key: rows_repeated([one[key] for one in seen], num) for key in first}
    if isinstance(first, list) and all(isinstance(one, str | int | float) for one in first):
        values = [one for batch in seen for one in batch]
        return [values[i % len(values)] for i in range(num)]
    if isinstance(first, list | tuple):
        parts = [rows_repeated([one[i] for one in seen], num) for i in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(f"A batch holds a {type(first).__name__}.")


def is_foreign(module: LightningModule) -> bool:
    """Whether a LightningModule belongs neither to this package nor to a subclass of its modules."""
    return is_instance(module, LightningModule) and not isinstance(module, UncertaintyModule)


def logger_for(module: LightningModule) -> Any:
    """A logger that discards everything, for a user's own module, which may write to it; no logger for other modules."""
    is_own = is_foreign(module) or (isinstance(module, EnsembleModule) and module.members is not None)
    return in_tree_of(module, DummyLogger)() if is_own else False
