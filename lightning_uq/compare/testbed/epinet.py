"""Epinets in their authors' configurations: the agent of the Neural Testbed, and ENN's epinets on ResNets.

Source: google-deepmind/neural_testbed and google-deepmind/enn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import Classification

# The original neither standardizes features nor measures its priors, so their scales are plain factors.
_ORIGINAL: dict[str, Any] = {"standardize_features": False, "calibrate_prior": False}

_RESNET: dict[str, dict[str, Any]] = {
    "cifar10": {
        "task": Classification(num_classes=10),
        "head": EpinetHead(index_dim=20, hidden_sizes=[50], prior_scale=4.0, **_ORIGINAL),
    },
    "cifar100": {
        "task": Classification(num_classes=100),
        "head": EpinetHead(index_dim=20, hidden_sizes=[50], prior_scale=0.5, additive_prior_scale=0.5, **_ORIGINAL),
        "prior": Factory("lightning_uq.networks.cifar_conv_prior", {"num_outputs": 100, "index_dim": 20, "seed": 23}),
    },
    "imagenet": {
        "task": Classification(num_classes=1000),
        "head": EpinetHead(index_dim=30, hidden_sizes=[50], base_scale=1 / 0.8, temperature=0.7, **_ORIGINAL),
        "prior": Factory(
            "lightning_uq.networks.imagenet_conv_prior", {"num_outputs": 1000, "index_dim": 30, "seed": 23}
        ),
    },
}


def epinet_for_testbed(
    num_features: int, num_classes: int, num_train: int, temperature: float, **kwargs: Any
) -> EpinetModule:
    """The Neural Testbed's epinet agent, in the original's own units.

    An MLP (50, 50) with an epinet (15, 15) on its input and last hidden layer, D_z = 8, and an additive prior of MLPs
    (5, 5) of scale 0.3 / T; 8 indices per step. Its penalty 0.2 (d / n)^0.7 sum p^2 is Adam's weight decay of twice that.
    The testbed trains it on batches of 100 for 1,000 steps, and for ten times as many if n / d > 500.

    The penalty does not fall with T, as those of the other agents do. At d = n = 100 and T = 0.01 it is twice theirs, and the network's
    output is the same for all inputs: only the prior depends on them. The joint divergence hardly suffers, the accuracy does. With
    half the penalty the network fits its data.

    Args:
        num_features: d.
        num_classes: C.
        num_train: n.
        temperature: T of the problem.
        kwargs: Arguments of :class:`EpinetModule` that replace these.

    Source: ``neural_testbed/agents/factories/epinet.py``, google-deepmind/neural_testbed.

    Example:
        >>> module = epinet_for_testbed(10, 2, 100, temperature=0.1)
        >>> sum(p.numel() for p in module.parameters())
        4733
    """
    base = {"in_features": num_features, "out_features": num_classes, "hidden_sizes": [50, 50]}
    prior = {"in_features": num_features, "num_outputs": num_classes, "index_dim": 8, "hidden_sizes": [5, 5]}
    decay = 2 * 0.2 * (num_features / num_train) ** 0.7
    head = EpinetHead(
        index_dim=8,
        hidden_sizes=[15, 15],
        prior_scale=0.0,
        additive_prior_scale=0.3 / temperature,
        **_ORIGINAL,
    )
    arguments: dict[str, Any] = {
        "feature_layers": ["0", "4"],
        "task": Classification(num_classes=num_classes),
        "head": head,
        "prior": Factory("lightning_uq.networks.mlp_prior", prior),
        "num_eval_samples": 1000,
        "optimizer": partial(torch.optim.Adam, lr=1e-3, weight_decay=decay),
    }
    return EpinetModule(Factory("lightning_uq.compat.haiku.haiku_mlp", base), **{**arguments, **kwargs})


def epinet_for_resnet(
    network: nn.Module | Factory | Callable[[], nn.Module],
    data: Literal["cifar10", "cifar100", "imagenet"],
    feature_layers: str | Sequence[str] = "auto",
    **kwargs: Any,
) -> EpinetModule:
    """An epinet on a trained, frozen ResNet, as published by ENN for a data set, in the original's own units.

    One hidden layer of 50. CIFAR-10: D_z = 20, epinet prior 4, no additive prior. CIFAR-100: D_z = 20, both priors 0.5,
    the additive one convolutional. ImageNet: D_z = 30, both priors 1, the base's logits divided by 0.8 and the
    outputs by 0.7 in evaluation.

    Args:
        network: The trained network from images [B, 3, H, W] to logits, or its factory.
        data: Data set of the configuration.
        feature_layers: The layer whose input holds the last features.
        kwargs: Arguments of :class:`EpinetModule` that replace these.

    Raises:
        InputError: ``data`` is unknown.

    Source: ``enn/checkpoints``, google-deepmind/enn.

    Example:
        >>> base = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> epinet_for_resnet(base, "cifar10")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([100, 2, 10])
    """
    if data not in _RESNET:
        raise InputError(f"`data` must be one of {', '.join(_RESNET)}, but it is {data!r}.")
    arguments = {"feature_layers": feature_layers, "freeze_base": True, **_RESNET[data]}
    return EpinetModule(network, **{**arguments, **kwargs})
