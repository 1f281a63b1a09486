"""Evidential classification: one network and one pass predict a Dirichlet over class probabilities."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.method import Method, Setting
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import EvidentialClassification, Segmentation, task_of
from lightning_uq.tasks.evidential_classification import EvidentialLossName


class EvidentialModule(DeterministicModule):
    """A classifier whose outputs are evidence: :class:`DeterministicModule` with an evidential task.

    :class:`~lightning_uq.tasks.EvidentialClassification` defines the loss, its annealing and the uncertainty. Other modules take
    that task too: ``EnsembleModule(network, task=EvidentialClassification())`` is an evidential ensemble.

    Args:
        network: The network, or a factory of it, which a checkpoint can store. It returns raw outputs [B, C], or maps [B, C, ...].
        loss: Name of a loss that replaces the task's: see :class:`~lightning_uq.tasks.EvidentialClassification`.
        task: The task with its other fields; default ``EvidentialClassification()``.
        training: Arguments of :class:`DeterministicModule`: ``optimizer``, ``output`` and the like.

    Raises:
        InputError: The task is not an evidential classification, or an argument is out of range.

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
        **training: Any,
    ) -> None:
        built = task_of(task)
        if not isinstance(built, EvidentialClassification):
            raise InputError(f"`task` must be an EvidentialClassification, but it is {built!r}.")
        built = built if loss is None else dataclasses.replace(built, loss=loss)
        self._replace_given(task=built, loss=None)  # the task holds the loss
        super().__init__(network, task=built, **training)


def _build(setting: Setting, loss: EvidentialLossName = "evidential") -> EvidentialModule:
    ignored = setting.task.ignore_index if isinstance(setting.task, Segmentation) else None
    task = EvidentialClassification(loss=loss, ignore_index=ignored)
    return EvidentialModule(setting.network, task=task, optimizer=setting.optimizer)


def _build_maxnorm(setting: Setting) -> EvidentialModule:
    return _build(setting, "maxnorm")


METHODS = (
    Method(
        name="evidential",
        about="one network that predicts a Dirichlet over class probabilities",
        build=_build,
        ood_score="vacuity",
        tasks=("classification", "segmentation"),
        link="https://arxiv.org/abs/1806.01768",
    ),
    Method(
        name="maxnorm",
        about="the evidential network with the max-norm loss",
        build=_build_maxnorm,
        ood_score="vacuity",
        link="https://arxiv.org/abs/1910.04819",
    ),
)
