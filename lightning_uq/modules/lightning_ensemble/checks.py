"""What a LightningModule must be to train beside others, and to be read as part of an ensemble."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.modules.lightning_ensemble.composite import APART
from lightning_uq.networks.calling import has_forward, takes_alone, takes_by_name
from lightning_uq.tasks import Task, describe


def overrides(member: LightningModule, name: str) -> bool:
    """Whether a member's class defines ``name`` itself, instead of taking Lightning's."""
    return getattr(type(member), name) is not getattr(in_tree_of(member, LightningModule), name)


def check_lightning_arguments(kind: str, **given: Any) -> None:
    """Raise an :class:`InputError` if an argument would change the steps that LightningModules bring themselves.

    Args:
        kind: The class of the members.
        given: The arguments of the ensemble.
    """
    given["optimizer"] = None if _is_plain_adam(given["optimizer"]) else given["optimizer"]
    for name in ("optimizer", "lr_scheduler", "loss", "prior_network", "bootstrap", "data_noise", "regularizer"):
        if given.get(name) not in (None, "none"):
            raise InputError(
                f"`{name}` must be left out where members are LightningModules, but it is {given[name]!r}. {kind} brings its own "
                "steps."
            )


def _is_plain_adam(optimizer: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether this is the default; the command line passes it as a partial with all its arguments."""
    made, plain = (make([nn.Parameter(torch.zeros(1, 1))]) for make in (optimizer, torch.optim.Adam))
    return type(made) is type(plain) and made.defaults == plain.defaults


def check_member(member: LightningModule) -> None:
    """Check that a LightningModule can train beside others.

    Raises:
        InputError: It optimizes by hand, or takes over another part of the training loop.
    """
    kind = type(member).__name__
    if not overrides(member, "training_step"):
        raise InputError(f"{kind} must define `training_step`, but it does not. {APART}")
    if not member.automatic_optimization:
        raise InputError(f"{kind} must leave optimization to Lightning, but it optimizes by hand. {APART}")
    if overrides(member, "backward"):
        raise InputError(f"{kind} must leave the backward pass to Lightning, but it overrides `backward`. {APART}")
    if "dataloader_iter" in inspect.signature(member.training_step).parameters:
        raise InputError(f"`training_step` of {kind} must take a batch, but it takes `dataloader_iter`. {APART}")


def unscorable_reason(
    member: LightningModule, batch: Any, unpack_batch: Callable[[Any], Any], task: Task
) -> str | None:
    """Why the ensemble's metrics cannot score a batch of its members, or None if they can."""
    problem = layout_problem(member, batch, unpack_batch)
    if problem is not None:
        return problem
    reason = task.accepts(unpack_batch(batch)[1])
    return None if reason is None else f"{reason}, as {describe(task)} expects"


def layout_problem(member: LightningModule, batch: Any, unpack_batch: Callable[[Any], Any]) -> str | None:
    """Why a batch's input and target are unknown, or what the member would make of them; None if they are known."""
    try:
        x, y = unpack_batch(batch)
    except InputError:
        return "the batches are not pairs (x, y). Override `unpack_batch` to return the input and the target"
    if not takes_alone(member, x) and not (has_forward(member) and takes_by_name(member, x)):
        return f"{type(member).__name__}.forward does not map one input to an output"
    if not isinstance(y, Tensor) or not y.ndim:
        return "the batches hold no target"
    return None
