"""Hypermodels: an index determines the weights of the whole network."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_uq.method import Method, Setting
from lightning_uq.modules.arguments import given_network
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork, Initialization
from lightning_uq.networks.indexers import ScaledGaussianIndexer
from lightning_uq.networks.output import Output
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers

PRIOR_SCALE = 10.0
"""Spread of the prior on the digits, in logits: the best of 1, 10, 30 in validation joint log-loss (tau 10), over seeds 100-104,
which the comparison does not use: 0.381, 0.276, 0.359; softmax has 0.418. Its price is a worse NLL: 0.049, 0.073, 0.134; softmax has
0.042."""


class HypermodelModule(UncertaintyModule):
    """A hypermodel of a network: f(x, z) = network(x; weights(z)) + prior(x, z), with z of mean squared length one.

    It has (index_dim + 1) P parameters, where P is the network's own number. Hypotheses differ where the data do not determine the
    function, and a prior sets how much.

    Args:
        network: The network whose weights are generated, or a factory of it, which a checkpoint can store. Its outputs are as the
            task expects, and it has no BatchNorm.
        index_dim: Dimension of z.
        hidden_sizes: Widths of the layers of an MLP from z to the weights. Without hidden layers, the weights are linear in z.
        scale: Whether generated weights are divided by sqrt(fan_in).
        initialization: ``"network"``: weights(z) vary about the network's own initial weights. ``"enn"``: as in ENN.
        prior: Factory of a frozen prior g(x, z) with outputs [Z, B, C], for instance
            :class:`~lightning_uq.networks.PriorIndependentLayers`. None: no prior.
        prior_scale: Scale of the prior.
        calibrate_prior: Whether that scale is the spread over z in units of the output (logits). Otherwise it is a factor.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        training: Arguments of :class:`UncertaintyModule`: ``task``, ``optimizer``, ``loss`` and the like.

    Raises:
        InputError: The network has no layer whose weights can be generated.
        UnsupportedError: The network has a BatchNorm layer.

    Source: Dwaracherla et al., "Hypermodels for Exploration", ICLR 2020 (arXiv 2006.07464).

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> prior = Factory(
        ...     "lightning_uq.networks.PriorIndependentLayers", {"in_features": 4, "out_features": 3, "index_dim": 6}
        ... )
        >>> HypermodelModule(network, index_dim=6, prior=prior)(torch.zeros(5, 4)).shape
        torch.Size([100, 5, 3])
    """

    default_train_samples = 16
    network: HypermodelNetwork

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        index_dim: int = 8,
        hidden_sizes: Sequence[int] = (),
        scale: bool = True,
        initialization: Initialization = "network",
        prior: Factory | Callable[[], nn.Module] | None = None,
        prior_scale: float = 1.0,
        calibrate_prior: bool = True,
        output: Output = "logits",
        **training: Any,
    ) -> None:
        super().__init__(
            HypermodelNetwork(
                given_network(network, training),
                indexer=ScaledGaussianIndexer(index_dim),
                hidden_sizes=hidden_sizes,
                scale=scale,
                initialization=initialization,
                prior=None if prior is None else build_network(prior, "prior"),
                prior_scale=prior_scale,
                calibrate_prior=calibrate_prior,
                output=output,
            ),
            **training,
        )


def _build(setting: Setting) -> HypermodelModule:
    sizes: dict[str, Any] = {"in_features": setting.num_features, "out_features": setting.num_targets}
    return HypermodelModule(
        setting.network,
        prior=functools.partial(PriorIndependentLayers, **sizes, index_dim=8),
        prior_scale=PRIOR_SCALE,
        optimizer=setting.optimizer,
    )


METHOD = Method(
    name="hypermodel",
    about="one network whose weights are a linear function of a random index",
    build=_build,
    ood_score="predictive_entropy",
    link="https://arxiv.org/abs/2006.07464",
)
