"""The default data of a fit without a ``dataloader``: the training data or the validation data."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Trainer

from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.running.loaders import (
    can_be_reread,
    fit_dataloader_of,
    reads_same_data,
    training_loader,
    validation_loaders,
)


class FittingData(ABC):
    """Selects which of a Trainer's data are fitted by default."""

    @abstractmethod
    def loader(self, trainer: Trainer, who: str) -> Any:
        """The loader; ``who``, the callback, begins the error message.

        Raises:
            InputError: There is no loader, or there are several.
        """

    @abstractmethod
    def limit(self, trainer: Trainer) -> int | float | None:
        """The limit on the number of its batches."""

    @abstractmethod
    def is_read_apart(self, trainer: Trainer) -> bool:
        """Whether only the fit reads the loader, and neither the training nor its validation does."""


class TrainingData(FittingData):
    """The data module's ``uq_fit_dataloader()``, else the training data, in order."""

    def loader(self, trainer: Trainer, who: str) -> Any:
        """The loader; raises if there are several training loaders, or a stream that several processes read whole."""
        provider = fit_dataloader_of(trainer.datamodule)  # type: ignore[attr-defined]
        if provider is not None:
            return provider()
        loader = training_loader(trainer)
        if isinstance(loader, dict | list | tuple):
            raise InputError(
                f"{who} needs exactly one training loader, but the Trainer has {len(loader)}. Pass the fitting data as `dataloader`."
            )
        if getattr(trainer.strategy, "repeats_training_rows", False) and not can_be_reread(loader):
            raise InputError(
                f"{who} would count rows several times, because under {type(trainer.strategy).__name__} several processes read the same training "
                "stream. Pass a stream that is divided by rank as `dataloader`."
            )
        return loader

    def limit(self, trainer: Trainer) -> int | float | None:
        """``limit_train_batches`` of the training loader."""
        if fit_dataloader_of(trainer.datamodule) is not None:  # type: ignore[attr-defined]
            return None
        limit: int | float | None = trainer.limit_train_batches
        return limit

    def is_read_apart(self, trainer: Trainer) -> bool:
        """Whether there is a ``uq_fit_dataloader()``."""
        return fit_dataloader_of(trainer.datamodule) is not None  # type: ignore[attr-defined]


class ValidationData(FittingData):
    """The only validation loader."""

    def loader(self, trainer: Trainer, who: str) -> Any:
        """The loader; raises unless there is exactly one."""
        loaders = validation_loaders(trainer)
        if len(loaders) != 1:
            raise InputError(
                f"{who} needs exactly one validation loader, but the Trainer has {len(loaders) or 'none'}. Pass a "
                "validation loader to `fit`, or the fitting data as `dataloader`."
            )
        known = trainer.train_dataloader
        if known is not None and reads_same_data(loaders[0], known):
            report_guess(
                f"{who} is fitted to a validation loader that reads the training data. Errors are smaller there than on new rows, so the fit "
                "will be overconfident. Pass rows that the network was not trained on as the validation loader, or as `dataloader`.",
                trainer.lightning_module,
            )
        return loaders[0]

    def limit(self, trainer: Trainer) -> int | float | None:
        """``limit_val_batches``."""
        limit: int | float | None = trainer.limit_val_batches
        return limit

    def is_read_apart(self, trainer: Trainer) -> bool:
        """Whether no validation runs during the training."""
        every, end = trainer.check_val_every_n_epoch, trainer.max_epochs
        return every is not None and end not in (None, -1) and trainer.current_epoch // every == end // every
