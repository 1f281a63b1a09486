"""Checkpoints that hold only plain data, and from which a training resumes exactly."""

from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import Self

from lightning_uq._lightning import (
    are_hyperparameters_given,
    name_hyperparameters,
    restricted_classmethod,
    trainer_of,
)
from lightning_uq.checkpoint_files import TRUST, read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.modules.arguments import saved_argument
from lightning_uq.modules.constructor import recorded
from lightning_uq.running.fitted_state import holds_fit
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.streams import from_plain, random_state, set_random_state, to_plain
from lightning_uq.running.transforms import transforms_of

_KEY = "lightning_uq_random_state"


class CheckpointedModule(LightningModule):
    """A LightningModule that saves its constructor arguments as plain data and the process's random state beside them.

    After a resume, everything that draws from the generators of torch, numpy and Python is therefore exact: indices, masks, the
    user's own dropout layers, the order of a shuffled loader. ``trainer.fit(module, loader, ckpt_path=...)`` ends with the weights
    of the uninterrupted training if the checkpoint was written at an epoch's end. A checkpoint from within an epoch also needs a
    loader with ``state_dict`` and ``load_state_dict``, such as torchdata's ``StatefulDataLoader``; with other loaders, Lightning
    restarts the epoch's data and warns. ``ReduceLROnPlateau`` is not exact, because Lightning saves before it steps. On several
    ranks, all take rank 0's random state.
    """

    given_arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the constructor record its arguments, and check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)
        if "__init__" in vars(cls):
            cls.__init__ = recorded(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_random_state: dict[str, Any] | None = None
        self._plain_arguments: dict[str, Any] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of the training, and all arguments of the constructor as plain data."""
        super().on_save_checkpoint(checkpoint)
        # As in any LightningModule, a subclass may have saved or ignored arguments with `save_hyperparameters`.
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        plain = {name: saved_argument(value) for name, value in saved.items()}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**self._plain_arguments, **plain}
        if trainer_of(self) is not None:  # without a Trainer, no training resumes from the file
            checkpoint[_KEY] = to_plain(random_state(self.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state until the training begins. Loading for other purposes does not change the generators."""
        super().on_load_checkpoint(checkpoint)
        self._warn_of_fits(checkpoint)
        if self.is_resuming and _KEY in checkpoint:
            self._resumed_random_state = from_plain(checkpoint[_KEY])

    def _warn_of_fits(self, checkpoint: dict[str, Any]) -> None:
        """Warn if the file holds a calibration or a density that neither this module nor the Trainer's callbacks have."""
        transforms = transforms_of(self)
        if self.is_resuming or (transforms is not None and len(transforms)):
            return
        trainer = trainer_of(self)
        callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        states = checkpoint.get("callbacks") or {}
        fitted = {key for key, state in states.items() if holds_fit(state)}
        missing = sorted(fitted - {callback.state_key for callback in callbacks})
        if missing:
            rank_zero_warn(
                f"The checkpoint holds what {' and '.join(missing)} fitted, but {type(self).__name__} predicts without it. Pass the same "
                "callbacks to a Trainer and the file as its `ckpt_path`, or use `load_fitted(path)`."
            )

    @property
    def is_resuming(self) -> bool:
        """Whether the checkpoint is being loaded to resume a training."""
        return trainer_of(self) is not None and self.trainer.state.fn == TrainerFn.FITTING

    def on_fit_start(self) -> None:
        """Set the random state before the loader's first draw."""
        super().on_fit_start()
        self._restore_random_state()

    def on_train_start(self) -> None:
        """Set the random state again after a restart within an epoch: the loader has just repeated draws from before the checkpoint."""
        super().on_train_start()
        if getattr(self.trainer.fit_loop, "restarted_mid_epoch", False):
            self._restore_random_state()

    def on_train_epoch_start(self) -> None:
        """Set the random state again if the checkpoint was written within an epoch, because the loader then starts anew."""
        super().on_train_epoch_start()
        if not getattr(self.trainer.fit_loop, "is_resuming", True):
            self._restore_random_state()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Drop the restored state: from here on, the generators advance as usual."""
        self._resumed_random_state = None
        return super().on_train_batch_start(batch, batch_idx)

    def _restore_random_state(self) -> None:
        if self._resumed_random_state is not None:
            set_random_state(self._resumed_random_state, self.device)

    @restricted_classmethod  # as in Lightning: a call on an instance would leave that instance unchanged
    def load_from_checkpoint(
        cls,  # noqa: N805  # a class method
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Load a module as Lightning does, but with ``weights_only=True`` by default, and one clear error for a file that does not fit.

        Args:
            checkpoint_path: The file.
            map_location: Device of its tensors.
            hparams_file: Hyper-parameters to use if the checkpoint has none.
            strict: Whether the names of the weights must match. None: the module's own setting.
            weights_only: False also runs code that is pickled in the file.
            kwargs: Constructor arguments to replace those in the file, or to add if the file could not store them.

        Raises:
            InputError: The file is damaged, holds pickled code, or was written by another class.
        """
        given = (checkpoint_path, map_location, hparams_file, strict, weights_only)
        try:
            return super().load_from_checkpoint(*given, **kwargs)
        except (UQError, FileNotFoundError):
            raise
        except Exception as error:
            if isinstance(checkpoint_path, str | Path) and weights_only is not False:
                read_checkpoint(checkpoint_path, "`checkpoint_path` must name a checkpoint", if_refused=TRUST)
            text = " ".join(str(error).split()) or type(error).__name__
            reason = text if len(text) < 500 else f"{text[:500]} ..."
            raise InputError(
                f"Argument `checkpoint_path` names {checkpoint_path}, which does not fit {cls.__name__}: {reason}"
            ) from error

    def _replace_given(self, **arguments: Any) -> None:
        """Replace these arguments in the checkpoint, if the constructor takes them."""
        self.given_arguments.update({k: value for k, value in arguments.items() if k in self.given_arguments})

    def _save_arguments(self) -> None:
        """Save the constructor's arguments as plain data, so that a checkpoint loads under ``weights_only=True``.

        An importable factory, optimizer or loss is saved by its name and arguments. A value without an importable name (a lambda, a
        built network) is marked as unsaved; ``restore_argument`` asks for it by name when the checkpoint is loaded.
        """
        arguments = vars(self).pop("given_arguments")
        if are_hyperparameters_given():
            self.save_hyperparameters()  # the command line's configuration, which is already plain data
            return
        self._plain_arguments = {name: saved_argument(value) for name, value in arguments.items()}
        self.save_hyperparameters(self._plain_arguments)
        name_hyperparameters(self)
