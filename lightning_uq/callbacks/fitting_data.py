"""The data that a callback fits where no ``dataloader`` was given: the training data, or the validation data."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Trainer

from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.running.loaders import fit_dataloader_of, reads_same_data, training_loader, validation_loaders


class FittingData(ABC):
    """Which of a Trainer's data is fitted by default."""

    @abstractmethod
    def loader(self, trainer: Trainer, who: str) -> Any:
        """The loader; the message of an error begins with ``who``, the callback.

        Raises:
            InputError: There is not exactly one.
        """

    @abstractmethod
    def limit(self, trainer: Trainer) -> int | float | None:
        """At most so many of its batches."""

    @abstractmethod
    def is_read_apart(self, trainer: Trainer) -> bool:
        """Whether neither the training nor its validation reads it, so that only the fit will."""


class TrainingData(FittingData):
    """The data module's ``uq_fit_dataloader()``, else the training data, in order."""

    def loader(self, trainer: Trainer, who: str) -> Any:
        """Of several training loaders none is the default."""
        provider = fit_dataloader_of(trainer.datamodule)  # type: ignore[attr-defined]
        if provider is not None:
            return provider()
        loader = training_loader(trainer)
        if isinstance(loader, dict | list | tuple):
            raise InputError(
                f"{who} needs one training loader to be fitted on, but the Trainer has {len(loader)}. Pass argument `dataloader`."
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
    """The one validation loader."""

    def loader(self, trainer: Trainer, who: str) -> Any:
        """Of several none is the default."""
        loaders = validation_loaders(trainer)
        if len(loaders) != 1:
            raise InputError(
                f"{who} needs one validation loader to be fitted on, but the Trainer has {len(loaders) or 'none'}. Pass a "
                "validation loader to `fit`, or argument `dataloader`."
            )
        known = trainer.train_dataloader
        if known is not None and reads_same_data(loaders[0], known):
            report_guess(
                f"{who} is fitted to the validation loader, which reads the training data. Errors are smaller there than on other rows, so what is "
                "fitted will be too sure. Pass rows that the network was not trained on as the validation loader, or as `dataloader`.",
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
