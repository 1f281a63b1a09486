"""Evidential regression: one network and one pass predict a Student-t distribution of the target."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.losses.evidential_regression import RegressionLoss
from lightning_uq.method import Method, Setting
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import EvidentialRegression, task_of


class EvidentialRegressionModule(DeterministicModule):
    """A regressor that predicts a normal-inverse-gamma: :class:`DeterministicModule` with an evidential task.

    :class:`~lightning_uq.tasks.EvidentialRegression` defines the loss and the uncertainty. Other modules take that task too.

    Args:
        network: The network, or a factory of it: raw outputs [B, 4 D], or [B, 3 D] for ``loss="meinert"``; see
            :func:`~lightning_uq.losses.evidential_regression.split_nig`.
        loss: ``"amini"``, ``"scaled"`` or ``"meinert"``; it replaces the task's loss.
        task: The task with its other fields; default ``EvidentialRegression()``.
        training: Arguments of :class:`DeterministicModule`: ``optimizer``, ``output`` and the like.

    Raises:
        InputError: The task is not an evidential regression, or an argument is out of range.

    Example:
        >>> import torch
        >>> module = EvidentialRegressionModule(nn.Linear(2, 4))
        >>> module.predict(torch.zeros(3, 2)).epistemic_variance.shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        loss: RegressionLoss | None = None,
        task: EvidentialRegression | str = "evidential_regression",
        **training: Any,
    ) -> None:
        built = task_of(task)
        if not isinstance(built, EvidentialRegression):
            raise InputError(f"`task` must be an EvidentialRegression, but it is {built!r}.")
        built = built if loss is None else dataclasses.replace(built, loss=loss)
        self._replace_given(task=built, loss=None)  # the task holds the loss
        super().__init__(network, task=built, **training)


REG_FACTOR = 0.1
"""Weight of the regularizer in the comparison. The mean validation NLL on three UCI tables (seeds 100 and 101) with 0.01 (the paper's), 0.1 and
1 was -1.18, -1.32 and -1.35; the plain network has -1.04. 0.1 is within the error of the best, and closer to the paper's value
(``benchmarks/regression_defaults.md``)."""


def _build(setting: Setting) -> EvidentialRegressionModule:
    task = EvidentialRegression(target_scale=setting.target_scale, reg_factor=REG_FACTOR)
    return EvidentialRegressionModule(setting.network_for(task), task=task, optimizer=setting.optimizer)


METHOD = Method(
    name="evidential",
    about="one network that predicts a normal-inverse-gamma, hence a Student-t",
    build=_build,
    ood_score="epistemic_variance",
    tasks=("regression",),
    link="https://arxiv.org/abs/1910.02600",
)
