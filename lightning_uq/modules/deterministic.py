"""The baseline: one network, one hypothesis."""

from collections.abc import Callable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_uq.modules.base import Loss, UncertaintyModule, restore_argument
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.output import Output
from lightning_uq.registry import Setting, register_method
from lightning_uq.tasks import Task


class DeterministicModule(UncertaintyModule):
    """One network, read as its task says: the baseline that every other method is measured against.

    Args:
        network: The network, or a factory of it (which a checkpoint can remember); its outputs are as the task expects.
        task: What the outputs mean; see :class:`UncertaintyModule`.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer.
        loss: ``loss(output, target) -> scalar``; default cross-entropy or Gaussian NLL.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.

    Example:
        >>> module = DeterministicModule(nn.Linear(4, 3))
        >>> module.predict(torch.zeros(2, 4)).probs.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        task: Task | str = "classification",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Loss | None = None,
        output: Output = "logits",
    ) -> None:
        network = restore_argument(network, "network")
        built = network if isinstance(network, nn.Module) else build_network(network)
        super().__init__(
            DeterministicNetwork(built, restore_argument(output, "output")),
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            loss=loss,
        )
        self._save_arguments(
            network=network,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            loss=loss,
            output=output,
        )


@register_method("softmax", ood_score="predictive_entropy")
@register_method("energy", ood_score="energy", trained_as="softmax")
def _softmax(setting: Setting) -> DeterministicModule:
    return DeterministicModule(setting.network, optimizer=setting.optimizer)
