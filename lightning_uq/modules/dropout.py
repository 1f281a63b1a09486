"""MC-dropout: a network whose dropout layers stay active in evaluation."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_uq.method import Method, Setting
from lightning_uq.modules.arguments import given_network
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.dropout import DropoutNetwork, Mask
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.output import Output

DROPOUT = 0.1
"""Dropout probability on the digits: the value of the testbed's agent, not tuned."""

DROPOUT_OF_NUMBERS = 0.02
"""Dropout probability for regression: the best of 0.02, 0.05 and 0.1 in mean validation NLL on three UCI tables, over seeds 100 and 101:
-0.92, -0.77, -0.62; the plain network has -1.04. On the noisiest table, concrete, the order is reversed: 0.10, 0.09, 0.02
(``benchmarks/regression_defaults.md``)."""

RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Dropout probabilities that tuning chooses among."""


class DropoutModule(UncertaintyModule):
    """MC-dropout: a network with dropout layers whose masks are determined by an index.

    Args:
        network: A network with ``nn.Dropout`` layers, or a factory of it, which a checkpoint can store. Its outputs are as the task
            expects.
        mask: ``"shared"``: one mask per index for the whole batch, so that each index is one function of x, as joint predictions
            require. ``"per_example"``: one mask per index and row of the batch, as is usual in MC-dropout.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        training: Arguments of :class:`UncertaintyModule`: ``task``, ``optimizer``, ``loss`` and the like.

    Raises:
        InputError: The network has no dropout layer.

    Source: Gal & Ghahramani, ICML 2016 (arXiv 1506.02142); Osband et al., arXiv 2107.08924, for shared masks.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        >>> DropoutModule(network)(torch.zeros(5, 4)).shape
        torch.Size([100, 5, 3])
    """

    network: DropoutNetwork

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        mask: Mask = "shared",
        output: Output = "logits",
        **training: Any,
    ) -> None:
        built = given_network(network, training)
        super().__init__(DropoutNetwork(built, mask=mask, output=output), **training)


def _build(setting: Setting) -> DropoutModule:
    default = DROPOUT_OF_NUMBERS if setting.task.has_numeric_targets else DROPOUT
    rate = setting.choose("dropout", default, *(other for other in RATES if other != default))
    return DropoutModule(setting.network_for(dropout=rate), **setting.training)


_ABOUT, _LINK = "one network whose dropout stays on, averaged over 100 masks", "https://arxiv.org/abs/1506.02142"

METHODS = (
    Method(
        name="dropout",
        about=_ABOUT,
        build=_build,
        ood_score="predictive_entropy",
        tasks=("classification", "segmentation", "binary", "multilabel"),
        link=_LINK,
    ),
    Method(
        name="dropout",
        about=_ABOUT,
        build=_build,
        ood_score="epistemic_variance",
        tasks=("regression",),
        link=_LINK,
    ),
)
