"""MC-dropout: a network's own dropout layers, left on in evaluation, as one set of hypotheses."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_uq.losses.data_noise import DataNoise
from lightning_uq.modules.base import Loss, Regularizer, UncertaintyModule, restore_argument
from lightning_uq.networks.dropout import DropoutNetwork, Mask
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.output import Output
from lightning_uq.registry import Setting, register_method
from lightning_uq.tasks import Task

DROPOUT = 0.1
"""Probability of a zero, on the digits: that of the testbed's agent, untuned."""


class DropoutModule(UncertaintyModule):
    """MC-dropout: a network with dropout layers, whose masks follow from an index.

    Args:
        network: A network with ``nn.Dropout`` layers, or a factory of it (which a checkpoint can remember); its outputs are
            as the task expects.
        mask: ``"shared"``: one mask an index, the same for all of the batch, so that an index is one function of x, as joint
            predictions need; ``"per_example"``: every row of a batch has masks of its own, as is usual in MC-dropout.
        num_train_samples: Masks drawn per training step.
        num_eval_samples: Masks per evaluation.
        task: What the outputs mean; see :class:`UncertaintyModule`.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer.
        loss: ``loss(output, target) -> scalar`` for one index; default cross-entropy or Gaussian NLL.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        return_members: Whether predictions keep their members [Z, B, C]; None: up to 32.
        data_noise: Noise on the training data that belongs to (sample, index); see :class:`UncertaintyModule`.
        regularizer: ``regularizer(network, x) -> scalar``, added to the training loss.

    Raises:
        InputError: The network has no dropout layer.

    Source: Gal & Ghahramani, ICML 2016 (arXiv 1506.02142); Osband et al., arXiv 2107.08924, for shared masks.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        >>> DropoutModule(network)(torch.zeros(5, 4)).shape
        torch.Size([100, 5, 3])
    """

    network: DropoutNetwork

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        mask: Mask = "shared",
        num_train_samples: int = 1,
        num_eval_samples: int = 100,
        *,
        task: Task | str = "classification",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Loss | None = None,
        output: Output = "logits",
        return_members: bool | None = None,
        data_noise: DataNoise | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        network = restore_argument(network, "network")
        built = network if isinstance(network, nn.Module) else build_network(network)
        super().__init__(
            DropoutNetwork(built, mask, restore_argument(output, "output")),
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            loss=loss,
            num_train_samples=num_train_samples,
            num_eval_samples=num_eval_samples,
            return_members=return_members,
            data_noise=data_noise,
            regularizer=regularizer,
        )
        self._save_arguments(**{**given, "network": network})


@register_method("dropout", ood_score="predictive_entropy")
def _dropout(setting: Setting) -> DropoutModule:
    if "temperature" in setting.options:  # the testbed's agent
        sizes: dict[str, Any] = {"hidden_sizes": (100, 100), "dropout": 0.1, "nonzero_bias": True}
        network = functools.partial(setting.network, **sizes)
        return DropoutModule(network, num_eval_samples=1000, optimizer=setting.optimizer)
    network = functools.partial(setting.network, dropout=DROPOUT)  # type: ignore[call-arg]  # the shared MLP has it
    return DropoutModule(network, optimizer=setting.optimizer)
