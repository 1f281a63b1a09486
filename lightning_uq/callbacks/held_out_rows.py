"""Rows that a network was not trained on, for a fit after its training."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_uq.errors import InputError
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.loaders import (
    check_loader,
    exact_loader,
    reads_same_data,
    training_loader,
    validation_loaders,
)
from lightning_uq.running.ranks import raising_on_all_ranks


class HeldOutRows:
    """The rows of a callback's argument ``held_out``, or else of the only validation loader of the training.

    Args:
        given: The argument.

    Raises:
        InputError: The argument is not a loader.
    """

    def __init__(self, given: Any = None) -> None:
        if given is not None:
            check_loader(given, "argument `held_out`")
        self.given = given
        self._known: Any = None  # the loader of a fit that may be repeated

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # it may hold worker processes or open files

    def forget(self) -> None:
        """Forget the loader of an earlier training."""
        self._known = None

    def find(self, trainer: Trainer | None) -> tuple[Any, str]:
        """The loader, or None and the reason. A repeated fit gets the loader of the previous one."""
        reason = ""
        if self.given is not None:
            return self.given, reason
        if trainer is None:
            self._known, reason = None, "there is no Trainer"
        elif trainer.state.fn == TrainerFn.FITTING:
            loaders = validation_loaders(trainer) if trainer.limit_val_batches else []
            self._known = loaders[0] if len(loaders) == 1 else None
            reason = f"there are {len(loaders)} validation loaders" if loaders else "there is no validation loader"
            if self._known is not None and reads_same_data(self._known, training_loader(trainer)):
                self._known, reason = None, "the validation loader reads the training data"
        else:
            reason = "this run has no training"
        return self._known, reason

    def exact(self, loader: Any, trainer: Trainer | None) -> Any:
        """The rows of ``loader`` that this rank reads, each once, with ``limit_val_batches`` for the validation loader."""
        limit = None if trainer is None or self.given is not None else trainer.limit_val_batches
        return exact_loader(loader, trainer, name="argument `held_out`", limit=limit)

    @property
    def where(self) -> str:
        """A description of the rows, for errors."""
        return "The held-out rows from " + ("the validation loader" if self.given is None else "argument `held_out`")

    def try_batch(self, read: Callable[[Any], object], model: LightningModule, trainer: Trainer, loader: Any) -> None:
        """Read the first batch before a training.

        Raises:
            InputError: There is no batch, or it cannot be read.
        """
        with raising_on_all_ranks(trainer), evaluating(model, trainer, fitting=True):
            for raw in exact_loader(loader, name="argument `held_out`", limit=1):
                try:
                    with torch.compiler.set_stance("force_eager"):
                        read(to_device(raw, model, trainer))
                except (InputError, RuntimeError) as error:  # torch's own, for a batch of another shape
                    raise InputError(f"{self.where} cannot be read like the training data: {error}") from error
                return
            raise InputError(f"{self.where} are empty.")
