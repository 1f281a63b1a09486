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


class DeterministicModule(UncertaintyModule):
    """One network, read as its task says: the baseline that every other method is measured against.

    Args:
        network: The network, or a factory of it (which a checkpoint can remember); its outputs are as the task expects.
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
    return DeterministicModule(setting.network, optimizer=setting.optimizer)


METHODS = (
    Method(name="softmax", build=_build, ood_score="predictive_entropy"),
    Method(name="energy", trained_as="softmax", ood_score="energy"),
)
