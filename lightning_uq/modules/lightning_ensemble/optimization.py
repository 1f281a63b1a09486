"""The joint optimization of LightningModules: one step of the ensemble is one step of each member."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_uq._lightning import (
    after_closure,
    has_replaced_schedulers,
    lightning_optimizer,
    optimizer_handles_unscaling,
)
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.modules.lightning_ensemble.checks import check_member, overrides
from lightning_uq.modules.lightning_ensemble.composite import CompositeOptimizer, MemberOptimizer, configure_member
from lightning_uq.modules.lightning_ensemble.part import Part

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MemberOptimization(Part):
    """The members' optimizers and schedulers during a fit, and Lightning's hooks for them.

    Attributes:
        optimizers: Each member's optimizer.
        schedulers: Each member's schedulers and their settings.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self.optimizers: list[Optimizer] = []
        self.schedulers: list[list[LRSchedulerConfig]] = []
        self._wrapped: list[LightningOptimizer] = []

    def configure_optimizers(self) -> CompositeOptimizer:
        """The members' optimizers as one; their schedulers join Lightning's in :meth:`attach_schedulers`.

        Raises:
            InputError: A member cannot train with others, or its optimizer holds another member's parameters.
        """
        self.optimizers, self.schedulers = [], []
        for i in range(len(self.members.modules)):
            with self.members.using_stream(i) as member:
                check_member(member)  # again: its `setup` may have turned automatic optimization off
                returned = member.configure_optimizers()
            optimizer, configs = configure_member(member, f"member_{i}", returned)
            self._check_parameters(i, optimizer)
            self.optimizers.append(optimizer)
            self.schedulers.append(configs)
        ensemble = self.members.ensemble
        strategy, scaler = ensemble.trainer.strategy, ensemble.gradient_scaler
        self._wrapped = [lightning_optimizer(MemberOptimizer(o, scaler), strategy) for o in self.optimizers]
        return CompositeOptimizer(self.optimizers)

    def _check_parameters(self, i: int, optimizer: Optimizer) -> None:
        """Refuse parameters that another member owns or trains. Frozen parameters may be shared."""
        kind = type(self.members.modules[i]).__name__
        trained = {id(p): p for p in _parameters(optimizer) if p.requires_grad}
        for j, member in enumerate(self.members.modules):
            if j != i and not trained.keys().isdisjoint(map(id, member.parameters())):
                raise InputError(
                    f"The optimizer of member {i} holds parameters of member {j}, which it would train as well. Let "
                    f"`configure_optimizers` of {kind} pass `self.parameters()`."
                )
        for j, other in enumerate(self.optimizers):
            shared = [p for p in _parameters(other) if id(p) in trained]
            if shared:
                raise InputError(
                    f"The optimizers of members {j} and {i} hold the same parameter of shape {tuple(shared[0].shape)}, which belongs to "
                    f"neither, so both would train it. Let `configure_optimizers` of {kind} pass `self.parameters()`."
                )

    def attach_schedulers(self) -> None:
        """Hand the members' schedulers to Lightning.

        Raises:
            InputError: Stochastic weight averaging would replace one of several schedulers of a member.
        """
        trainer: Any = self.members.ensemble.trainer  # a connector sets `callbacks`
        averaging = [callback for callback in trainer.callbacks if is_instance(callback, StochasticWeightAveraging)]
        if averaging and len(self.schedulers[0]) > 1:
            raise InputError(
                f"StochasticWeightAveraging replaces one scheduler, but {type(self.members.modules[0]).__name__} has "
                f"{len(self.schedulers[0])}. Return one from `configure_optimizers`."
            )
        resumed = any(has_replaced_schedulers(callback) for callback in averaging)
        trainer.strategy.lr_scheduler_configs = [] if resumed else self._all_schedulers()

    def follow_replaced_schedulers(self) -> None:
        """If a callback has replaced the first scheduler, as stochastic weight averaging does, drop every member's schedulers.

        The replacement schedules the composite optimizer, and so all members. Each member then sees it as its own scheduler.
        """
        configs = self.members.ensemble.trainer.strategy.lr_scheduler_configs
        own = {id(config) for config in self._all_schedulers()}
        if own <= {id(config) for config in configs}:
            return
        configs[:] = [config for config in configs if id(config) not in own]
        self.schedulers = [list(configs) for _ in self.schedulers]

    def _all_schedulers(self) -> list[LRSchedulerConfig]:
        return [config for configs in self.schedulers for config in configs]

    def optimizers_of(self, i: int, use_pl_optimizer: bool = True) -> Any:
        """The value of member i's ``self.optimizers()``."""
        return (self._wrapped if use_pl_optimizer else self.optimizers)[i]

    def schedulers_of(self, i: int) -> Any:
        """The value of member i's ``self.lr_schedulers()``."""
        schedulers = [config.scheduler for config in self.schedulers[i]]
        return schedulers[0] if len(schedulers) == 1 else schedulers or None

    # ------------------------------------------------------------------ Lightning's hooks

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a member's scheduler as that member does, and a callback's scheduler as Lightning does."""
        for i, configs in enumerate(self.schedulers):
            if any(config.scheduler is scheduler for config in configs):
                with self.members.using_stream(i) as member:
                    member.lr_scheduler_step(scheduler, metric)
                return
        LightningModule.lr_scheduler_step(self.members.ensemble, scheduler, metric)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Run one closure for all members, then each member's own step; a gradient scaler unscales each member separately."""
        step_member = partial(self._step_member, epoch, batch_idx)
        precision = self.members.ensemble.trainer.precision_plugin
        scaler = self.members.ensemble.gradient_scaler
        if scaler is None:
            step: Callable[..., Any] = optimizer.step
            step(closure=optimizer_closure, step_member=step_member)
            return
        assert optimizer_closure is not None
        # Lightning would search for infinite gradients once for all: a member that overflows would block the others.
        skipped = optimizer_closure() is None
        optimizers = {i: o for i, o in enumerate(self.optimizers) if not skipped and _has_gradient(o)}
        for member_optimizer in optimizers.values():
            if not optimizer_handles_unscaling(member_optimizer):
                scaler.unscale_(member_optimizer)
        raw = optimizer.optimizer if is_instance(optimizer, LightningOptimizer) else optimizer
        after_closure(precision, self.members.ensemble, raw)
        for i in optimizers:
            step_member(i)
        if optimizers:
            scaler.update()

    def _step_member(self, epoch: int, batch_idx: int, i: int) -> None:
        if overrides(self.members.modules[i], "optimizer_step"):
            with self.members.using_stream(i) as member:
                member.optimizer_step(epoch, batch_idx, self._wrapped[i], partial(self._loss_of, i))
        else:
            self._wrapped[i].step()

    def _loss_of(self, i: int) -> Tensor | None:
        """The closure for member i's own ``optimizer_step``. It has run already, for all members at once."""
        loss = self.members.steps.losses[i]
        return None if loss is None else loss.detach().clone()

    def on_validation_model_zero_grad(self) -> None:
        """Clear gradients before a validation as each member does."""
        for i in range(len(self.members.modules)):
            with self.members.using_stream(i) as member:
                member.on_validation_model_zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear gradients as each member does."""
        for member, own in zip(self.members.modules, self.optimizers, strict=True):
            member.optimizer_zero_grad(epoch, batch_idx, own)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member's gradient separately."""
        for member, own in zip(self.members.modules, self.optimizers, strict=True):
            member.configure_gradient_clipping(own, gradient_clip_val, gradient_clip_algorithm)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for p in _parameters(optimizer))
