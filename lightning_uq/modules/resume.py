"""Exact resumption: a training goes on with the random numbers, and so the data order, that it would have had."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_uq.modules.streams import from_plain, random_state, set_random_state, to_plain

_KEY = "lightning_uq_random_state"


class ExactResume(LightningModule):
    """Keeps the process' random state in its checkpoints, and takes it up where a training is resumed.

    At the end of an epoch, that is: within one, Lightning begins the data anew. On several ranks all take up rank 0's.
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
        if self._resumed_random_state is not None:
            set_random_state(self._resumed_random_state, self.device)

    def on_train_epoch_start(self) -> None:
        """Set it again where the checkpoint was written before its epoch had ended: the loader begins once more."""
        super().on_train_epoch_start()
        again = not getattr(self.trainer.fit_loop, "is_resuming", True)
        if self._resumed_random_state is not None and again:
            set_random_state(self._resumed_random_state, self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Forget it: the generators go on by themselves."""
        self._resumed_random_state = None
        return super().on_train_batch_start(batch, batch_idx)
