"""Exact resumption: a training goes on with the random numbers, and so the data order, that it would have had."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_uq.running.streams import from_plain, random_state, set_random_state, to_plain

_KEY = "lightning_uq_random_state"


class ExactResume(LightningModule):
    """Keeps the process' random state in its checkpoints, and takes it up where a training is resumed.

    Whatever draws from the generators of torch, numpy and Python in the process is exact then: indices, masks, the user's
    own dropout layers, the order of a shuffled loader. ``trainer.fit(module, loader, ckpt_path=...)`` so ends with the
    weights of the uninterrupted training, from a checkpoint of an epoch's end. Within an epoch that takes a loader with
    ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader``, say): with any other, Lightning begins the data
    anew and warns. A ``ReduceLROnPlateau`` is not exact, since Lightning saves before its step. On several ranks all take up
    rank 0's random state.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_random_state: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = to_plain(random_state(self.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember it until the training begins; loading for anything else leaves the generators alone."""
        super().on_load_checkpoint(checkpoint)
        if self.is_resuming and _KEY in checkpoint:
            self._resumed_random_state = from_plain(checkpoint[_KEY])

    @property
    def is_resuming(self) -> bool:
        """Whether what is being loaded is a training to go on with."""
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def on_fit_start(self) -> None:
        """Set the random state before the loader's first draw."""
        super().on_fit_start()
        self._take_up()

    def on_train_start(self) -> None:
        """Set it again in mid-epoch: what the loader drew to begin, it had drawn when the checkpoint was written."""
        super().on_train_start()
        if getattr(self.trainer.fit_loop, "restarted_mid_epoch", False):
            self._take_up()

    def on_train_epoch_start(self) -> None:
        """Set it again where the checkpoint was written before its epoch had ended: the loader begins once more."""
        super().on_train_epoch_start()
        if not getattr(self.trainer.fit_loop, "is_resuming", True):
            self._take_up()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Forget it: the generators go on by themselves."""
        self._resumed_random_state = None
        return super().on_train_batch_start(batch, batch_idx)

    def _take_up(self) -> None:
        if self._resumed_random_state is not None:
            set_random_state(self._resumed_random_state, self.device)
