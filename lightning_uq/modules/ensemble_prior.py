"""Ensembles with matched priors, as a row of the comparison: each member has a frozen network of its own architecture."""

import functools
import math

import torch

from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from lightning_uq.registry import Setting, register_method

PRIOR_SCALE = 100.0
"""Factor of the members' priors on the digits: the best of 1, 3, 10, 30, 100 in validation joint log-loss (tau 10), over seeds
100-104, which the comparison does not use: 0.358, 0.359, 0.343, 0.314, 0.272; without a prior 0.349. The priors are networks at
their initial weights, whose logits are small."""


@register_method("ensemble_prior", ood_score="mutual_information")
def _ensemble_prior(setting: Setting) -> EnsembleModule:
    if (
        "temperature" in setting.options
    ):  # the testbed's agent, with 10 members; a member's penalty is Adam's weight decay
        temperature, d, n = setting.options["temperature"], setting.num_features, setting.num_train
        sizes = {"in_features": d, "out_features": setting.num_classes, "hidden_sizes": [50, 50]}
        network = Factory("lightning_uq.networks.haiku.haiku_mlp", sizes)
        return EnsembleModule(
            network,
            num_members=10,
            num_classes=setting.num_classes,
            prior_network=network,
            prior_scale=3 / math.sqrt(temperature),
            optimizer=functools.partial(torch.optim.Adam, lr=1e-3, weight_decay=2 * math.sqrt(temperature) * d / n),
        )
    return EnsembleModule(
        setting.network,
        num_classes=setting.num_classes,
        prior_network=setting.network,
        prior_scale=PRIOR_SCALE,
        optimizer=setting.optimizer,
    )
