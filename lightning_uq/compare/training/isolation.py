"""Isolates the post-training callbacks of several methods under one Trainer from each other."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_uq.compare.progress.warning_notes import at_work
from lightning_uq.errors import NotFiniteError, without_period
from lightning_uq.modules.base import UncertaintyModule

_HOOKS = tuple(name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown"))


class IsolatedCallbacks(Callback):
    """Runs callbacks as if those of other methods did not exist.

    In each hook, the Trainer lists only these callbacks and those shared by all methods. Changes to predictions that they make after the training
    are undone.

    Args:
        callbacks: The callbacks of one method.
        method: Name of the method, for its warnings.

    Attributes:
        callbacks: The callbacks of one method.
        method: Name of the method.
        seconds: The time of the callbacks after the training.
        diverged: The reason why nothing could be fitted after the training, if the network's outputs are not finite.

    Example:
        >>> from lightning.pytorch.callbacks import LambdaCallback
        >>> seen = []
        >>> one = LambdaCallback(on_train_end=lambda trainer, module: seen.append(len(trainer.callbacks)))
        >>> trainer = Trainer(callbacks=[IsolatedCallbacks([one]), IsolatedCallbacks([])], logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        >>> for callback in trainer.callbacks:
        ...     callback.on_train_end(trainer, LightningModule())
        >>> seen, len(trainer.callbacks)
        ([1], 2)
    """

    def __init__(self, callbacks: Sequence[Callback], method: str = "") -> None:
        self.callbacks = list(callbacks)
        self.method = method
        self.seconds = 0.0
        self.diverged: str | None = None

    @contextmanager
    def _alone(self, trainer: Trainer) -> Iterator[None]:
        listed: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
        shared = [one for one in listed if not isinstance(one, IsolatedCallbacks)]
        trainer.callbacks = [*self.callbacks, *shared]  # type: ignore[attr-defined]
        try:
            yield
        finally:
            trainer.callbacks = listed  # type: ignore[attr-defined]

    def _run(self, hook: str, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        try:
            with self._alone(trainer), at_work(self.method):
                for callback in self.callbacks:
                    getattr(callback, hook)(trainer, pl_module, *args, **kwargs)
        except NotFiniteError as error:
            if hook != "on_train_end":
                raise
            self.diverged = without_period(error)  # the other methods that use this training continue
        if hook == "on_train_end":
            self.seconds = time.perf_counter() - start
            if isinstance(pl_module, UncertaintyModule):
                pl_module.prediction_transforms.clear()


def _forwarding(hook: str) -> Callable[..., None]:
    def forward(
        self: IsolatedCallbacks, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._run(hook, trainer, pl_module, *args, **kwargs)

    return forward


for _hook in _HOOKS:
    setattr(IsolatedCallbacks, _hook, _forwarding(_hook))
