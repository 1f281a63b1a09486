"""Ensembles with matched priors, as a row of the comparison: each member has a frozen network of its own architecture."""

from lightning_uq.method import Method, Setting
from lightning_uq.modules.ensemble import EnsembleModule

PRIOR_SCALE = 100.0
"""Factor of the members' priors on the digits: the best of 1, 3, 10, 30, 100 in validation joint log-loss (tau 10), over seeds
100-104, which the comparison does not use: 0.358, 0.359, 0.343, 0.314, 0.272; without a prior 0.349. The priors are networks at
their initial weights, whose logits are small."""


def _build(setting: Setting) -> EnsembleModule:
    return EnsembleModule(
        setting.network,
        num_members=5,
        prior_network=setting.network,
        prior_scale=PRIOR_SCALE,
        optimizer=setting.optimizer,
    )


METHOD = Method(name="ensemble_prior", build=_build, ood_score="mutual_information")
