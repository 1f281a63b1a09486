"""Evidential classification: one network, one pass, a Dirichlet over class probabilities."""

import dataclasses
from collections.abc import Callable

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn, optim

from lightning_uq.errors import InputError
from lightning_uq.modules.base import restore_argument
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.output import Output
from lightning_uq.registry import Setting, register_method
from lightning_uq.tasks import EvidentialClassification, task_of
from lightning_uq.tasks.evidential_classification import EvidentialLossName


class EvidentialModule(DeterministicModule):
    """A classifier whose outputs are evidence: :class:`DeterministicModule` with an evidential task.

    :class:`~lightning_uq.tasks.EvidentialClassification` holds the loss, its annealing and what its uncertainty means. Any other
    module takes that task as well: ``EnsembleModule(network, task=EvidentialClassification())`` is an evidential ensemble.

    Args:
        network: The network, or a factory of it (which a checkpoint can remember): raw outputs [B, C], or maps [B, C, ...].
        loss: Name of the loss, in the place of the task's: see :class:`~lightning_uq.tasks.EvidentialClassification`.
        task: The task with its further fields; default ``EvidentialClassification()``.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer.
        output: ``"logits"``, or a function that picks the raw outputs from what the network returns.

    Raises:
        InputError: The task is no evidential classification, or an argument is not as above.

    Example:
        >>> import torch
        >>> module = EvidentialModule(nn.Linear(4, 3), loss="maxnorm")
        >>> module.predict(torch.zeros(2, 4)).vacuity.shape
        torch.Size([2])
    """

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        loss: EvidentialLossName | None = None,
        task: EvidentialClassification | str = "evidential_classification",
        optimizer: OptimizerCallable = optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        output: Output = "logits",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        built = task_of(restore_argument(task, "task"))
        if not isinstance(built, EvidentialClassification):
            raise InputError(f"`task` must be an EvidentialClassification, but it is {built!r}.")
        super().__init__(
            network,
            task=built if loss is None else dataclasses.replace(built, loss=loss),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            output=output,
        )
        self._save_arguments(**{**given, "loss": None, "task": self.task})  # the task knows its loss


@register_method("evidential", ood_score="vacuity")
def _evidential(setting: Setting) -> EvidentialModule:
    return EvidentialModule(setting.network, optimizer=setting.optimizer)


@register_method("maxnorm", ood_score="vacuity")
def _maxnorm(setting: Setting) -> EvidentialModule:
    return EvidentialModule(setting.network, loss="maxnorm", optimizer=setting.optimizer)
