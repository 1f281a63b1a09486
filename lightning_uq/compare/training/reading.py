"""How the predictions of any module are read: its batches, its outputs, and the samples that the time is taken of."""

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
    """Reads the outputs of a module."""
    return LogitReader(**reading.arguments, infers_task=False)


class ReadPredictions(Callback):
    """Lets ``trainer.predict`` give this package's predictions of a module that is not of this package, with nothing fitted."""

    def __init__(self, reading: Reading) -> None:
        self.reader = logit_reader(reading)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predictions are those of this package."""
        wrap_predict_step(pl_module, self.reader, None)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module has its own ``predict_step`` again."""
        unwrap_predict_step(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module has its own ``predict_step`` again."""
        unwrap_predict_step(pl_module)


@contextmanager
def reading_predictions(module: LightningModule, reading: Reading | None) -> Iterator[None]:
    """Inside, ``predict_step`` gives predictions of this package, as :class:`ReadPredictions` makes them; None leaves it as it is."""
    if reading is not None:
        wrap_predict_step(module, logit_reader(reading), None)
    try:
        yield
    finally:
        unwrap_predict_step(module)


def target_of(batch: Any, module: LightningModule, reading: Reading | None) -> Tensor | None:
    """The target of a batch, as the module that predicts it unpacks it."""
    if reading is not None:
        return logit_reader(reading).unpack(module, batch)[1]
    unpack = module.unpack_batch if isinstance(module, UncertaintyModule) else batches.unpack_batch
    found: Tensor | None = unpack(batch)[1]
    return found


class Loader(LightningDataModule):
    """One loader of a data module, for a prediction with the hooks that the data module has for its batches.

    Args:
        data: The data module.
        loader: One of its loaders.
    """

    def __init__(self, data: Any, loader: Any) -> None:
        super().__init__()
        self.data = data
        self.loader = loader
        # Lightning asks which hooks are overridden, and one of a data module comes before the module's own.
        for hook in HOOKS:
            if is_overridden(data, hook):
                setattr(self, hook, getattr(data, hook))

    def predict_dataloader(self) -> Any:
        """The loader."""
        self.data.trainer = self.trainer  # a hook may ask what runs
        return self.loader


def data_for(module: LightningModule, data: LightningDataModule | TaskData) -> Any:
    """A data module in the tree of Lightning's classes to which the module belongs, so that its Trainer takes it."""
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
    """One batch of ``num`` rows out of batches with tensors [B, ...] in plain containers, repeated from the first row on.

    Raises:
        TypeError: A batch holds something else.

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
    """Whether a module is a LightningModule of neither this package nor its subclasses."""
    return is_instance(module, LightningModule) and not isinstance(module, UncertaintyModule)


def logger_for(module: LightningModule) -> Any:
    """A logger that forgets everything, for modules of the user's own, which may write to it; no logger for others."""
    is_own = is_foreign(module) or (isinstance(module, EnsembleModule) and module.members is not None)
    return in_tree_of(module, DummyLogger)() if is_own else False
