"""LightningModules as members of an ensemble, unmodified: each takes the steps that it would take alone.

One composite optimizer steps the members' own under automatic optimization, so that ``global_step``, accumulation,
clipping, precision plugins and DDP stay Lightning's. What a member asks of its Trainer (logging, optimizers, schedulers,
hooks) is answered for that member.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_uq.errors import InputError
from lightning_uq.modules.composite import APART, CompositeOptimizer, ScaledOptimizer, configure_member
from lightning_uq.modules.member_logs import MemberLogs
from lightning_uq.modules.streams import RandomStream, from_plain, to_plain

# What the first member answers for all: where the data come from, and what happens to a batch before the device.
_ANSWERED_BY_FIRST = (
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "configure_callbacks",
)
_STAGES = ("train", "validation", "test", "predict")
# What every member hears in its turn.
_HEARD_BY_ALL = (
    *(f"on_{stage}_{when}" for stage in ("fit", *_STAGES) for when in ("start", "end")),
    *(f"on_{stage}_epoch_{when}" for stage in _STAGES for when in ("start", "end")),
    *(f"on_{stage}_batch_{when}" for stage in _STAGES for when in ("start", "end")),
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


class MemberHooks(MemberLogs):
    """A LightningModule around members: what it does for those that are LightningModules themselves.

    A subclass hands its members to :meth:`adopt`, and calls :meth:`training_steps` and :meth:`evaluation_steps`. As long as
    nothing is adopted, all of this is Lightning's default.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lightning_members: tuple[LightningModule, ...] = ()
        self.streams: list[RandomStream] = []
        self._outputs: list[Any] = []
        self._losses: list[Tensor | None] = []
        self._composite: CompositeOptimizer | None = None
        self._schedulers: list[list[LRSchedulerConfig]] = []

    def adopt(self, members: Sequence[LightningModule], streams: Sequence[RandomStream]) -> None:
        """Take the members in, each with its random stream.

        Raises:
            InputError: A member optimizes by hand, or otherwise takes the training loop over.
        """
        for member in members:
            check_member(member)
        self.lightning_members = tuple(members)
        self.streams = list(streams)
        if not all(member.strict_loading for member in members):
            self.strict_loading = False
        # As attributes of this instance, so that Lightning sees them overridden where the member's class overrides them.
        first = members[0]
        self.__dict__.update({name: getattr(first, name) for name in _ANSWERED_BY_FIRST if overrides(first, name)})
        if overrides(first, "on_after_batch_transfer"):
            self.__dict__["on_after_batch_transfer"] = self._after_transfer
        if overrides(first, "configure_model"):
            self.__dict__["configure_model"] = partial(self.each_member, "configure_model")

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers and schedulers are the Trainer's; these are references to them, of one run.
        return {**super().__getstate__(), "_composite": None, "_schedulers": []}

    # ------------------------------------------------------------------ turns

    @contextmanager
    def speaking(self, i: int) -> Iterator[None]:
        """Member i's turn: the random numbers are its own. What a sanity check draws is forgotten, as it is alone."""
        with self.streams[i].active(self.device, advance=not self.trainer.sanity_checking):
            yield

    def each_member(self, hook: str, *args: Any, own: Sequence[Any] | None = None) -> list[Any]:
        """Call a hook of every member whose class has one; ``own[i]`` takes the place of member i's first argument."""
        results = []
        for i, member in enumerate(self.lightning_members):
            skipped = hook == "on_before_backward" and own is not None and own[i] is None
            if overrides(member, hook) and not skipped:
                with self.speaking(i):
                    results.append(getattr(member, hook)(*(args if own is None else (own[i], *args[1:]))))
        self.log_means()
        return results

    def setup(self, stage: str) -> None:
        """Give the members what they ask of their Trainer."""
        super().setup(stage)
        for i, member in enumerate(self.lightning_members):
            member.trainer = self.trainer
            # Bound methods and partials, no lambdas: a spawned process gets them by pickle.
            member.__dict__.update(
                log=partial(self.log_for, i),
                optimizers=partial(self._optimizers_of, i),
                lr_schedulers=partial(self._schedulers_of, i),
            )
        self.each_member("setup", stage)

    def teardown(self, stage: str) -> None:
        """Leave the members as they came."""
        self.each_member("teardown", stage)
        for member in self.lightning_members:
            for name in ("log", "optimizers", "lr_schedulers"):
                member.__dict__.pop(name, None)
        super().teardown(stage)

    # ------------------------------------------------------------------ steps

    def training_steps(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Every member's training step; returns the sum of their losses, so that each gets its own gradient."""
        self._outputs, self._losses = [], []
        for i, member in enumerate(self.lightning_members):
            with self.speaking(i):
                mine = member.on_after_batch_transfer(batch, 0) if self._transfers_by_member() else batch
                output = self.member_training_step(member, mine, batch_idx)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None and isinstance(output, Mapping):
                raise InputError(
                    f"Expected the mapping that `training_step` of {type(member).__name__} returns to hold `loss`, but got "
                    f"keys {sorted(map(str, output))}."
                )
            self._losses.append(loss)
            extra = (
                {key: value for key, value in output.items() if key != "loss"} if isinstance(output, Mapping) else {}
            )
            accumulated = self.trainer.accumulate_grad_batches
            self._outputs.append({} if loss is None else {"loss": loss.detach() / accumulated, **extra})
        self.log_means()
        losses = [loss for loss in self._losses if loss is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def member_training_step(self, member: LightningModule, batch: Any, batch_idx: int) -> Any:
        """What one member's ``training_step`` returns; a subclass may add to its loss."""
        return call_step(member.training_step, batch, batch_idx)

    def evaluation_steps(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Every member's ``validation_step`` or ``test_step``, where it has one."""
        self._outputs = [None] * len(self.lightning_members)
        for i, member in enumerate(self.lightning_members):
            if overrides(member, step):
                with self.speaking(i):
                    self._outputs[i] = call_step(getattr(member, step), batch, batch_idx, dataloader_idx)
        self.log_means()

    def _transfers_by_member(self) -> bool:
        datamodule = getattr(self.trainer, "datamodule", None)
        by_datamodule = datamodule is not None and is_overridden("on_after_batch_transfer", datamodule)
        return "on_after_batch_transfer" in self.__dict__ and not by_datamodule

    def _after_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Augmentation on the device: in training every member does its own, in its step.
        return (
            batch if self.trainer.training else self.lightning_members[0].on_after_batch_transfer(batch, dataloader_idx)
        )

    # ------------------------------------------------------------------ optimization

    def configure_members(self) -> CompositeOptimizer:
        """The members' optimizers as one; their schedulers join Lightning's in :meth:`on_fit_start`."""
        optimizers, self._schedulers = [], []
        for i, member in enumerate(self.lightning_members):
            check_member(member)  # its `setup` may have turned automatic optimization off
            with self.speaking(i):
                returned = member.configure_optimizers()
            optimizer, configs = configure_member(member, f"member_{i}", returned)
            optimizers.append(optimizer)
            self._schedulers.append(configs)
        self._composite = CompositeOptimizer(optimizers)
        return self._composite

    def on_fit_start(self) -> None:
        """Hand the members' schedulers to Lightning, before it restores their state."""
        if self.lightning_members:
            self.trainer.strategy.lr_scheduler_configs = [config for configs in self._schedulers for config in configs]
        super().on_fit_start()
        self.each_member("on_fit_start")

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler the way its owner does."""
        for i, configs in enumerate(self._schedulers):
            if any(config.scheduler is scheduler for config in configs):
                with self.speaking(i):
                    self.lightning_members[i].lr_scheduler_step(scheduler, metric)
                return
        super().lr_scheduler_step(scheduler, metric)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One closure for all members, then every member's own step; under a gradient scaler each is unscaled by itself."""
        if not self.lightning_members:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        step_member = partial(self._step_member, epoch, batch_idx)
        precision = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        if scaler is None:
            step: Callable[..., Any] = optimizer.step
            step(closure=optimizer_closure, step_member=step_member)
            return
        assert self._composite is not None
        assert optimizer_closure is not None
        # Lightning would look for infinite gradients once for all: a member that overflows would stop the others.
        skipped = optimizer_closure() is None
        optimizers = {i: o for i, o in enumerate(self._composite.optimizers) if not skipped and _has_gradient(o)}
        for member_optimizer in optimizers.values():
            if not _optimizer_handles_unscaling(member_optimizer):
                scaler.unscale_(member_optimizer)
        precision._after_closure(self, self._composite)
        for i, member_optimizer in optimizers.items():
            step_member(i, ScaledOptimizer(member_optimizer, scaler))
        if optimizers:
            scaler.update()

    def _step_member(self, epoch: int, batch_idx: int, i: int, optimizer: Any) -> None:
        member = self.lightning_members[i]
        if overrides(member, "optimizer_step"):
            with self.speaking(i):
                member.optimizer_step(epoch, batch_idx, optimizer, _closure_ran)
        else:
            optimizer.step()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear gradients the way every member does."""
        if not self.lightning_members:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        for i, member in enumerate(self.lightning_members):
            member.optimizer_zero_grad(epoch, batch_idx, self._member_optimizers[i])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip every member's gradient by itself."""
        if not self.lightning_members:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for i, member in enumerate(self.lightning_members):
            member.configure_gradient_clipping(self._member_optimizers[i], gradient_clip_val, gradient_clip_algorithm)

    # ------------------------------------------------------------------ checkpoint

    def save_members(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What the members add to a checkpoint: their random streams, and what their own hooks put in."""
        own: list[dict[str, Any]] = [{} for _ in self.lightning_members]
        self._call_with_own_checkpoints("on_save_checkpoint", checkpoint, own)
        return {"members": own, "streams": [None if s.state is None else to_plain(s.state) for s in self.streams]}

    def load_members(self, checkpoint: dict[str, Any], saved: Mapping[str, Any], *, resuming: bool) -> None:
        """The inverse; the streams go on only where a training is resumed."""
        self._call_with_own_checkpoints("on_load_checkpoint", checkpoint, saved["members"])
        if resuming:
            for stream, state in zip(self.streams, saved["streams"], strict=True):
                stream.state = None if state is None else from_plain(state)

    def _call_with_own_checkpoints(self, hook: str, checkpoint: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Show every member a checkpoint of its own, with its weights under their own names."""
        state = checkpoint["state_dict"]
        for i, member in enumerate(self.lightning_members):
            if overrides(member, hook):
                prefix = f"network.members.{i}."
                names = [name for name in state if name.startswith(prefix)]
                mine = {**own[i], "state_dict": {name.removeprefix(prefix): state.pop(name) for name in names}}
                getattr(member, hook)(mine)
                state.update({prefix + name: value for name, value in mine.pop("state_dict").items()})
                own[i] = mine

    # ------------------------------------------------------------------ what a member asks

    @property
    def _member_optimizers(self) -> list[Optimizer]:
        return [] if self._composite is None else self._composite.optimizers

    def _optimizers_of(self, i: int, use_pl_optimizer: bool = True) -> Any:
        optimizer = self._member_optimizers[i]
        strategy = self.trainer.strategy
        return LightningOptimizer._to_lightning_optimizer(optimizer, strategy) if use_pl_optimizer else optimizer

    def _schedulers_of(self, i: int) -> Any:
        schedulers = [config.scheduler for config in self._schedulers[i]]
        return schedulers[0] if len(schedulers) == 1 else schedulers or None

    def _own_arguments(self, hook: str) -> Sequence[Any] | None:
        """Each member's own first argument of a hook, where it has one."""
        if hook.endswith("_batch_end") and hook != "on_predict_batch_end":
            return self._outputs
        if hook in ("on_before_zero_grad", "on_before_optimizer_step"):
            return self._member_optimizers
        return self._losses if hook == "on_before_backward" else None


def _heard_by_all(name: str) -> Callable[..., Any]:
    def hook(self: MemberHooks, *args: Any) -> Any:
        result = getattr(super(MemberHooks, self), name)(*args)
        if not self.lightning_members:
            return result
        results = self.each_member(name, *args, own=self._own_arguments(name))
        # -1 from `on_train_batch_start` skips the rest of an epoch: for all members or for none.
        return -1 if results and all(r == -1 for r in results) else result

    hook.__name__ = hook.__qualname__ = name
    hook.__doc__ = f"Let every member hear ``{name}``."
    return hook


for _name in _HEARD_BY_ALL:
    if _name not in vars(MemberHooks):
        setattr(MemberHooks, _name, _heard_by_all(_name))


def overrides(member: LightningModule, name: str) -> bool:
    """Whether a member's class brings its own ``name``."""
    return getattr(type(member), name) is not getattr(LightningModule, name)


def check_member(member: LightningModule) -> None:
    """An :class:`InputError` where a LightningModule cannot train beside others."""
    kind = type(member).__name__
    if not overrides(member, "training_step"):
        raise InputError(f"Expected {kind} to define `training_step`, as a LightningModule that trains does. {APART}")
    if not member.automatic_optimization:
        raise InputError(f"Expected {kind} to leave optimization to Lightning, but it optimizes by hand. {APART}")
    if overrides(member, "backward"):
        raise InputError(
            f"Expected {kind} to leave the backward pass to Lightning, but it overrides `backward`. {APART}"
        )
    if "dataloader_iter" in inspect.signature(member.training_step).parameters:
        raise InputError(f"Expected `training_step` of {kind} to take a batch, but it takes `dataloader_iter`. {APART}")


def maps_one_input(member: LightningModule) -> bool:
    """Whether a member has a ``forward`` of one argument."""
    required = [
        p
        for p in inspect.signature(member.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return overrides(member, "forward") and len(required) == 1


def call_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call a step with as many of ``(batch, batch_idx, dataloader_idx)`` as it takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return step(*arguments)
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return step(*arguments[: len(taken)])


def _closure_ran() -> None:
    """The closure of a member's own ``optimizer_step``: it ran already, for all members at once."""


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
