"""Networks f(x, z): an input, and an index that says which hypothesis is speaking."""

from lightning_uq.networks.base import DeterministicNetwork, EpistemicNetwork
from lightning_uq.networks.ensemble import (
    EnsembleNetwork,
    StackedEnsembleNetwork,
    VmapEnsembleNetwork,
    build_ensemble,
)
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.mlp import MLP, TabularNetwork, load_deep_ensembles_state
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors import NetworkWithPrior, freeze_as_buffers
from lightning_uq.networks.spectral_norm import remove_spectral_norm, spectral_normalize

__all__ = [
    "MLP",
    "DeterministicNetwork",
    "EnsembleNetwork",
    "EpistemicNetwork",
    "Factory",
    "NetworkWithPrior",
    "OutputReader",
    "StackedEnsembleNetwork",
    "TabularNetwork",
    "VmapEnsembleNetwork",
    "build_ensemble",
    "freeze_as_buffers",
    "load_deep_ensembles_state",
    "remove_spectral_norm",
    "spectral_normalize",
]
