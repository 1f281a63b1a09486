"""The LightningModules of an ensemble, as one object that the ensemble holds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uq._lightning import trainer_of
from lightning_uq.errors import InputError
from lightning_uq.modules.lightning_ensemble.checkpoints import load_members, save_members
from lightning_uq.modules.lightning_ensemble.checks import check_member, check_overrides, overrides
from lightning_uq.modules.lightning_ensemble.composite import APART
from lightning_uq.modules.lightning_ensemble.hooks import FROM_FIRST_MEMBER, REPLACED
from lightning_uq.modules.lightning_ensemble.logs import MemberLogs
from lightning_uq.modules.lightning_ensemble.metrics import EnsembleMetrics
from lightning_uq.modules.lightning_ensemble.modes import MemberModes
from lightning_uq.modules.lightning_ensemble.optimization import MemberOptimization
from lightning_uq.modules.lightning_ensemble.steps import MemberSteps
from lightning_uq.modules.lightning_ensemble.trainer import MemberTrainer, ReleaseOnException
from lightning_uq.running.streams import RandomStream

if TYPE_CHECKING:
    from lightning_uq.modules.ensemble import EnsembleModule


class Members:
    """The unmodified LightningModules of an ensemble: each takes the steps that it would take alone.

    Lightning runs the ensemble, and the ensemble passes every hook on to this object (``hooks.py`` lists them). One composite
    optimizer steps the members' optimizers under automatic optimization, so Lightning keeps ``global_step``, accumulation, clipping,
    precision plugins and DDP. If a member uses its Trainer (logging, optimizers, schedulers), it gets its own values.

    Args:
        ensemble: The module that holds the members.
        modules: The members.
        streams: The random stream of each.

    Attributes:
        logs: The members' logging.
        steps: The members' training and evaluation steps.
        optimization: The members' optimizers and schedulers.
        modes: The members' train and eval modes around an evaluation.
        metrics: The metrics of the ensemble as a whole, in addition to the members' logged values.
        stopping: The numbers of the members that have set ``trainer.should_stop``.
    """

    def __init__(
        self, ensemble: "EnsembleModule", modules: Sequence[LightningModule], streams: Sequence[RandomStream]
    ) -> None:
        self.ensemble = ensemble
        self.modules = tuple(modules)
        self.streams = tuple(streams)
        self.logs = MemberLogs(self)
        self.steps = MemberSteps(self)
        self.optimization = MemberOptimization(self)
        self.modes = MemberModes(self)
        self.metrics = EnsembleMetrics(self)
        self.stopping: set[int] = set()

    def hooks_of_data(self) -> dict[str, Callable[..., Any]]:
        """The hooks that Lightning calls only if a module overrides them, so the ensemble overrides them if its members do."""
        first = self.modules[0]
        hooks: dict[str, Callable[..., Any]] = {
            **{name: getattr(first, name) for name in FROM_FIRST_MEMBER},
            "on_after_batch_transfer": self.steps.after_transfer,
            "configure_model": partial(self.call_each, "configure_model"),
            "on_validation_model_train": self.modes.on_validation_model_train,
            "on_test_model_train": self.modes.on_test_model_train,
        }
        return {name: hooks[name] for name in hooks if overrides(first, name) and not overrides(self.ensemble, name)}

    @contextmanager
    def using_stream(self, i: int) -> Iterator[LightningModule]:
        """A context in which random numbers come from member i's stream. As in Lightning, draws of a sanity check do not count."""
        trainer = trainer_of(self.ensemble)  # None if a checkpoint is loaded without a Trainer
        checking = trainer is not None and trainer.sanity_checking
        with self.streams[i].active(self.ensemble.device, advance=not checking):
            yield self.modules[i]

    def pass_on(self, hook: str, *args: Any) -> Any:
        """Pass a hook on: to the method of that name in this class, otherwise to each member."""
        method = getattr(self, hook, None)
        if method is not None:
            return method(*args)
        self.call_each(hook, *args)
        return None

    def call_each(self, hook: str, *args: Any) -> list[Any]:
        """Call a hook of every member whose class has it, with that member's own batch, outputs, loss or optimizer.

        Returns:
            The result of each member's hook; None for members without it.
        """
        if hook.endswith("_batch_start"):
            self.steps.forget()
        results: list[Any] = [None] * len(self.modules)
        for i, module in enumerate(self.modules):
            if not overrides(module, hook) or (hook == "on_before_backward" and self.steps.losses[i] is None):
                continue
            with self.using_stream(i):
                results[i] = getattr(module, hook)(*self._arguments_of(i, hook, args))
        self.logs.log_means()
        if hook.endswith("_batch_end"):
            self.steps.end()
        return results

    def _arguments_of(self, i: int, hook: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if hook.endswith("_batch_start"):
            return (self.steps.batch_of(i, args[0]), *args[1:])
        if hook == "on_predict_batch_end":  # predictions belong to the ensemble
            return (args[0], self.steps.batch_of(i, args[1]), *args[2:])
        if hook.endswith("_batch_end"):
            return (self.steps.outputs[i], self.steps.batch_of(i, args[1]), *args[2:])
        if hook == "on_before_backward":
            loss, scaler = self.steps.losses[i], self.ensemble.gradient_scaler
            return (loss if scaler is None else scaler.scale(loss),)
        if hook in ("on_before_zero_grad", "on_before_optimizer_step"):
            return (self.optimization.optimizers[i],)
        return args

    # ------------------------------------------------------------------ hooks that do more than call each member

    def configure_callbacks(self) -> Any:
        """The first member's callbacks, which apply to all."""
        return self.modules[0].configure_callbacks()

    def setup(self, stage: str) -> None:
        """Give each member its own view of the Trainer.

        Raises:
            InputError: A fit begins, and a member uses manual optimization or takes over the training loop, or the ensemble's
                class overrides a hook that its members replace.
        """
        if stage == "fit":
            check_overrides(type(self.ensemble), REPLACED, self.modules[0])
            for module in self.modules:
                check_member(module)
        self.release()
        trainer: Any = self.ensemble.trainer  # a connector sets `callbacks`
        trainer.callbacks = [*trainer.callbacks, ReleaseOnException(self)]
        for i, module in enumerate(self.modules):
            module.trainer = MemberTrainer(self, i)  # type: ignore[assignment]  # it acts as a Trainer
            # Bound methods and partials rather than lambdas: a spawned process receives them by pickle.
            vars(module).update(
                log=partial(self.logs.log, i),
                optimizers=partial(self.optimization.optimizers_of, i),
                lr_schedulers=partial(self.optimization.schedulers_of, i),
            )
        self.call_each("setup", stage)

    def teardown(self, stage: str) -> None:
        """Restore the members' original state."""
        self.call_each("teardown", stage)
        self.release()

    def release(self) -> None:
        """Remove what :meth:`setup` gave to the members."""
        trainer: Any = self.ensemble.trainer
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, ReleaseOnException)]
        self.stopping = set()
        for module in self.modules:
            module.trainer = trainer
            for name in ("log", "optimizers", "lr_schedulers"):
                vars(module).pop(name, None)

    def on_fit_start(self) -> None:
        """Hand the members' schedulers to Lightning, before it restores their state."""
        self.optimization.attach_schedulers()
        self.call_each("on_fit_start")

    def on_train_epoch_start(self) -> None:
        """If a callback has replaced the members' schedulers, apply the new one to all members."""
        self.optimization.follow_replaced_schedulers()
        self.call_each("on_train_epoch_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the rest of the epoch if all members ask for it.

        Returns:
            -1 if every member returned -1, else None.

        Raises:
            InputError: Some members returned -1 and others did not.
        """
        self.metrics.look_at_training(batch, batch_idx)
        skips = [result == -1 for result in self.call_each("on_train_batch_start", batch, batch_idx)]
        if any(skips) and not all(skips):
            raise InputError(
                f"Member {skips.index(True)} returned -1 from `on_train_batch_start` to skip the rest of the epoch, but member "
                f"{skips.index(False)} did not. Members share their epochs. {APART}"
            )
        return -1 if all(skips) else None

    def on_train_epoch_end(self) -> None:
        """Put the task in doubt if targets of this epoch contradict it."""
        self.call_each("on_train_epoch_end")
        self.metrics.agree_on_task()

    def on_train_end(self) -> None:
        """Warn if some members stopped the training of all."""
        if self.stopping and len(self.stopping) < len(self.modules):
            rank_zero_warn(
                f"Member {min(self.stopping)} set `trainer.should_stop`, which stops all members: the others may end earlier than "
                f"they would alone. {APART}"
            )
        self.call_each("on_train_end")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the ensemble as a whole."""
        self.call_each("on_validation_epoch_end")
        self.metrics.log("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the ensemble as a whole."""
        self.call_each("on_test_epoch_end")
        self.metrics.log("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random streams, and the entries of the members' own hooks."""
        save_members(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the members' state; the random streams only when a training resumes."""
        load_members(self, checkpoint)
