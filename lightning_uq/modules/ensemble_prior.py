"""Ensembles with matched priors, as a row of the comparison: each member has a frozen network of its own architecture."""

import functools
import math
from typing import Any

from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.registry import Setting, register_method

PRIOR_SCALE = 100.0
"""Factor of the members' priors on the digits: the best of 1, 3, 10, 30, 100 in validation joint log-loss (tau 10), over seeds
100-104, which the comparison does not use: 0.358, 0.359, 0.343, 0.314, 0.272; without a prior 0.349. The priors are networks at
their initial weights, whose logits are small."""


@register_method("ensemble_prior", ood_score="mutual_information")
def _ensemble_prior(setting: Setting) -> EnsembleModule:
    network, scale = setting.network, PRIOR_SCALE
    if "temperature" in setting.options:  # the testbed's agent, whose first biases are not zero
        start: dict[str, Any] = {"nonzero_bias": True}
        network, scale = functools.partial(setting.network, **start), 3 / math.sqrt(setting.options["temperature"])
    return EnsembleModule(
        network,
        num_members=setting.options.get("num_members", 5),
        prior_network=network,
        prior_scale=scale,
        optimizer=setting.optimizer,
    )
