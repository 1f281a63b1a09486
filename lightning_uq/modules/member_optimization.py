"""The optimization of LightningModules side by side: one step of Lightning's is a step of every member's own."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_uq.errors import InputError
from lightning_uq.modules.composite import APART, CompositeOptimizer, ScaledOptimizer, configure_member
from lightning_uq.modules.member_logs import MemberLogs
from lightning_uq.running.streams import RandomStream


class MemberOptimization(MemberLogs):
    """A LightningModule that optimizes its members as each would be alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lightning_members: tuple[LightningModule, ...] = ()
        self.streams: list[RandomStream] = []
        self._composite: CompositeOptimizer | None = None
        self._schedulers: list[list[LRSchedulerConfig]] = []

    @contextmanager
    def speaking(self, i: int) -> Iterator[None]:
        """Member i's turn: the random numbers are its own. What a sanity check draws is forgotten, as it is alone."""
        with self.streams[i].active(self.device, advance=not self.trainer.sanity_checking):
            yield

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
            member.optimizer_zero_grad(epoch, batch_idx, self.member_optimizers[i])

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
            member.configure_gradient_clipping(self.member_optimizers[i], gradient_clip_val, gradient_clip_algorithm)

    @property
    def member_optimizers(self) -> list[Optimizer]:
        """Each member's optimizer, while a fit runs."""
        return [] if self._composite is None else self._composite.optimizers

    def optimizers_of(self, i: int, use_pl_optimizer: bool = True) -> Any:
        """What member i's ``self.optimizers()`` gives."""
        optimizer = self.member_optimizers[i]
        strategy = self.trainer.strategy
        return LightningOptimizer._to_lightning_optimizer(optimizer, strategy) if use_pl_optimizer else optimizer

    def schedulers_of(self, i: int) -> Any:
        """What member i's ``self.lr_schedulers()`` gives."""
        schedulers = [config.scheduler for config in self._schedulers[i]]
        return schedulers[0] if len(schedulers) == 1 else schedulers or None


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


def _closure_ran() -> None:
    """The closure of a member's own ``optimizer_step``: it ran already, for all members at once."""


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
