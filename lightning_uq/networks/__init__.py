"""Networks f(x, z): an input, and an index that says which hypothesis is speaking."""

from lightning_uq.networks.base import DeterministicNetwork, EpistemicNetwork
from lightning_uq.networks.dropout import DropoutNetwork
from lightning_uq.networks.ensemble import (
    EnsembleNetwork,
    StackedEnsembleNetwork,
    VmapEnsembleNetwork,
    build_ensemble,
)
from lightning_uq.networks.epinet import Epinet, EpinetNetwork, ProjectedMLP
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.haiku import load_haiku, read_haiku
from lightning_uq.networks.indexers import (
    DirichletIndexer,
    EnsembleIndexer,
    GaussianIndexer,
    GaussianWithUnitIndexer,
    Indexer,
    ScaledGaussianIndexer,
    SeedIndexer,
)
from lightning_uq.networks.mlp import MLP, TabularNetwork, load_deep_ensembles_state
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors import (
    AdditivePrior,
    NetworkWithPrior,
    cifar_conv_prior,
    freeze_as_buffers,
    imagenet_conv_prior,
    imagenet_mlp_prior,
    mlp_prior,
    truncated_normal_init_,
)
from lightning_uq.networks.spectral_norm import remove_spectral_norm, spectral_normalize

__all__ = [
    "MLP",
    "AdditivePrior",
    "DeterministicNetwork",
    "DirichletIndexer",
    "DropoutNetwork",
    "EnsembleIndexer",
    "EnsembleNetwork",
    "Epinet",
    "EpinetNetwork",
    "EpistemicNetwork",
    "Factory",
    "GaussianIndexer",
    "GaussianWithUnitIndexer",
    "Indexer",
    "NetworkWithPrior",
    "OutputReader",
    "ProjectedMLP",
    "ScaledGaussianIndexer",
    "SeedIndexer",
    "StackedEnsembleNetwork",
    "TabularNetwork",
    "VmapEnsembleNetwork",
    "build_ensemble",
    "cifar_conv_prior",
    "freeze_as_buffers",
    "imagenet_conv_prior",
    "imagenet_mlp_prior",
    "load_deep_ensembles_state",
    "load_haiku",
    "mlp_prior",
    "read_haiku",
    "remove_spectral_norm",
    "spectral_normalize",
    "truncated_normal_init_",
]
