"""Ensembles as methods of the comparison."""

from lightning_uq.method import Method, Setting
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.tasks import Regression

NUM_MEMBERS = 5

PRIOR_SCALE = 100.0
"""Scale of the members' priors on the digits: the best of 1, 3, 10, 30, 100 in validation joint log-loss (tau 10), over seeds
100-104, which the comparison does not use: 0.358, 0.359, 0.343, 0.314, 0.272; without a prior 0.349. The priors are networks at
their initial weights, whose logits are small."""

_LINK = "https://arxiv.org/abs/1612.01474"


def _build(setting: Setting) -> EnsembleModule:
    return EnsembleModule(setting.network, num_members=NUM_MEMBERS, **setting.training)


def _build_means(setting: Setting) -> EnsembleModule:
    task = Regression(head="mean", target_scale=setting.target_scale)
    network = setting.network_for(task)
    return EnsembleModule(network, num_members=NUM_MEMBERS, task=task, optimizer=setting.optimizer)


def _build_with_prior(setting: Setting) -> EnsembleModule:
    return EnsembleModule(
        setting.network,
        num_members=NUM_MEMBERS,
        prior_network=setting.network,
        prior_scale=setting.choose("prior_scale", PRIOR_SCALE, 3.0, 10.0, 30.0),
        **setting.training,
    )


METHODS = (
    Method(
        name="ensemble",
        about=f"{NUM_MEMBERS} networks from different initial weights, whose predictions are averaged",
        build=_build,
        ood_score="mutual_information",
        tasks=("classification", "segmentation", "binary", "multilabel"),
        link=_LINK,
    ),
    Method(
        name="ensemble",
        about=f"{NUM_MEMBERS} networks from different initial weights, each with a mean and a variance",
        build=_build,
        ood_score="epistemic_variance",
        tasks=("regression",),
        link=_LINK,
    ),
    Method(
        name="ensemble_mean",
        about=f"{NUM_MEMBERS} networks that predict a mean, whose spread is the only uncertainty",
        build=_build_means,
        ood_score="epistemic_variance",
        tasks=("regression",),
        link=_LINK,
    ),
    Method(
        name="ensemble_prior",
        about=f"{NUM_MEMBERS} networks, each added to a frozen random network of its own",
        build=_build_with_prior,
        ood_score="mutual_information",
        link="https://arxiv.org/abs/1806.03335",
    ),
)
