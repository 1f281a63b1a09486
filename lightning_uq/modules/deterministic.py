"""The baseline: one network, one hypothesis."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_uq.method import Method, Setting
from lightning_uq.modules.arguments import given_network
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.output import Output
from lightning_uq.tasks import Regression

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels that the quantile network predicts in the comparison; the outermost give the central 90 % interval."""


class DeterministicModule(UncertaintyModule):
    """One network with the outputs that its task expects: the baseline for every other method.

    Args:
        network: The network, or a factory of it, which a checkpoint can store. Its outputs are as the task expects.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        training: Arguments of :class:`UncertaintyModule`: ``task``, ``optimizer``, ``loss`` and the like.

    Example:
        >>> import torch
        >>> module = DeterministicModule(nn.Linear(4, 3))
        >>> module.predict(torch.zeros(2, 4)).probs.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, network: nn.Module | Factory | Callable[[], nn.Module], *, output: Output = "logits", **training: Any
    ) -> None:
        super().__init__(DeterministicNetwork(given_network(network, training), output), **training)


def _build(setting: Setting) -> DeterministicModule:
    return DeterministicModule(setting.network, **setting.training)


def _build_quantiles(setting: Setting) -> DeterministicModule:
    task = Regression(head="quantiles", levels=QUANTILE_LEVELS, target_scale=setting.target_scale)
    return DeterministicModule(setting.network_for(task), task=task, optimizer=setting.optimizer)


METHODS = (
    Method(
        name="softmax",
        about="one network with a softmax over classes",
        build=_build,
        ood_score="predictive_entropy",
        tasks=("classification", "segmentation"),
        link="https://arxiv.org/abs/1610.02136",
    ),
    Method(
        name="sigmoid",
        about="one network with a sigmoid per label",
        build=_build,
        ood_score="predictive_entropy",
        tasks=("binary", "multilabel"),
        link="https://doi.org/10.1007/978-3-642-76153-9_28",
    ),
    Method(
        name="gaussian",
        about="one network that predicts a mean and a variance",
        build=_build,
        ood_score="variance",
        tasks=("regression",),
        link="https://doi.org/10.1109/ICNN.1994.374138",
    ),
    Method(
        name="quantile",
        about="one network that predicts quantiles",
        build=_build_quantiles,
        ood_score="interval_width",
        tasks=("regression",),
        link="https://doi.org/10.2307/1913643",
    ),
    Method(
        name="energy",
        about="the softmax network; inputs with low logits are out of distribution",
        trained_as="softmax",
        ood_score="energy",
        link="https://arxiv.org/abs/2010.03759",
        detects_only=True,
    ),
)
