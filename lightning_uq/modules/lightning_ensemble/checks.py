"""Requirements on LightningModules that train together and form an ensemble."""

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.modules.lightning_ensemble.composite import APART
from lightning_uq.networks.calling import has_forward, takes_alone, takes_by_name
from lightning_uq.running.overriding import reaches_package
from lightning_uq.tasks import describe

if TYPE_CHECKING:
    from lightning_uq.modules.ensemble import EnsembleModule


def overrides(member: LightningModule, name: str) -> bool:
    """Whether a member's class overrides Lightning's ``name``."""
    return getattr(type(member), name) is not getattr(in_tree_of(member, LightningModule), name)


def check_lightning_arguments(kind: str, **given: Any) -> None:
    """Raise an :class:`InputError` if an argument would change the steps that LightningModules define themselves.

    Args:
        kind: The class of the members.
        given: The arguments of the ensemble.
    """
    given["optimizer"] = None if _is_plain_adam(given["optimizer"]) else given["optimizer"]
    for name in (
        "optimizer",
        "lr_scheduler",
        "loss",
        "prior_network",
        "bootstrap",
        "data_noise",
        "regularizer",
        "trunk",
    ):
        if given.get(name) not in (None, "none"):
            raise InputError(
                f"`{name}` must be left out if members are LightningModules, but it is {given[name]!r}. {kind} brings its own "
                "steps."
            )


def _is_plain_adam(optimizer: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether this is the default optimizer, which the command line passes as a partial with all its arguments."""
    made, plain = (make([nn.Parameter(torch.zeros(1, 1))]) for make in (optimizer, torch.optim.Adam))
    return type(made) is type(plain) and made.defaults == plain.defaults


def check_member(member: LightningModule) -> None:
    """Check that a LightningModule can train together with others.

    Raises:
        InputError: It uses manual optimization, or takes over another part of the training loop.
    """
    kind = type(member).__name__
    if not overrides(member, "training_step"):
        raise InputError(f"{kind} must define `training_step`, but it does not. {APART}")
    if not member.automatic_optimization:
        raise InputError(f"{kind} must leave optimization to Lightning, but it uses manual optimization. {APART}")
    if overrides(member, "backward"):
        raise InputError(f"{kind} must leave the backward pass to Lightning, but it overrides `backward`. {APART}")
    if "dataloader_iter" in inspect.signature(member.training_step).parameters:
        raise InputError(f"`training_step` of {kind} must take a batch, but it takes `dataloader_iter`. {APART}")


def check_overrides(ensemble: type[LightningModule], hooks: Iterable[str], member: LightningModule) -> None:
    """Raise an :class:`InputError` if a subclass of the ensemble replaces a hook that its LightningModules replace."""
    for name in hooks:
        if not reaches_package(ensemble, name):
            kind = type(member).__name__
            raise InputError(
                f"{ensemble.__name__} overrides `{name}` without a call of `super()`, but its members are LightningModules, whose own "
                f"`{name}` would not run. Override it in {kind}, or call `super().{name}(...)`."
            )


def unscorable_reason(ensemble: "EnsembleModule", y: Tensor) -> str | None:
    """The reason why an ensemble's metrics cannot score a target of its members; None if they may."""
    if ensemble.inferred_task is not None and ensemble.inferred_task.contradiction is not None:
        return ensemble.inferred_task.contradiction
    reason = ensemble.task.accepts(y)
    return None if reason is None else f"{reason}, as {describe(ensemble.task)} expects; pass `task`"


def input_problem(ensemble: "EnsembleModule", batch: Any) -> str | None:
    """The reason why a batch's input, or the members' outputs for it, are unknown; None if they are known."""
    try:
        x, _ = ensemble.unpack_batch(batch)
    except InputError as error:
        return str(error)
    member: Any = ensemble.network.called_network
    by_name = has_forward(member) and takes_by_name(member, x)
    if ensemble.network.read_output.predict_fn is None and not by_name and not takes_alone(member, x):
        return f"{type(member).__name__}.forward does not map one input to an output. Pass `predict_fn`"
    return None


def layout_problem(ensemble: "EnsembleModule", batch: Any) -> str | None:
    """The reason why a batch's input and target, or the members' outputs for it, are unknown; None if they are known."""
    problem = input_problem(ensemble, batch)
    if problem is not None:
        return problem
    _, y = ensemble.unpack_batch(batch)
    if not isinstance(y, Tensor) or not y.ndim:
        return "the batches hold no target. Pass `unpack_batch`, a function that returns the input and the target"
    return None
