"""Networks f(x, z) of an input and an index, which selects one hypothesis."""

from lightning_uq.networks.backbones.by_name import backbone, default_backbone
from lightning_uq.networks.base import DeterministicNetwork, EpistemicNetwork
from lightning_uq.networks.categorical_regression import CategoricalRegressionNetwork, CatMLPEnsemble
from lightning_uq.networks.dropout import DropoutNetwork
from lightning_uq.networks.ensemble import (
    BatchEnsembleNetwork,
    EnsembleNetwork,
    LoraEnsembleNetwork,
    SharedTrunkNetwork,
    StackedEnsembleNetwork,
    VmapEnsembleNetwork,
    build_ensemble,
)
from lightning_uq.networks.epinet.head import Epinet, EpinetHead
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.epinet.projected_mlp import ProjectedMLP
from lightning_uq.networks.export import export_fitted
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.gaussian_noise import GaussianNoiseMLP
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.index_mlp import IndexMLP, index_mlp_with_gp_prior
from lightning_uq.networks.indexers import (
    DirichletIndexer,
    EnsembleIndexer,
    GaussianIndexer,
    GaussianWithUnitIndexer,
    Indexer,
    ScaledGaussianIndexer,
    SeedIndexer,
)
from lightning_uq.networks.initializers import truncated_normal_init_, variance_scaling_
from lightning_uq.networks.mlp import MLP, TabularNetwork, load_deep_ensembles_state
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors.additive import (
    AdditivePrior,
    cifar_conv_prior,
    imagenet_conv_prior,
    imagenet_mlp_prior,
    mlp_prior,
)
from lightning_uq.networks.priors.frozen import freeze_as_buffers
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers
from lightning_uq.networks.priors.index_priors import ChoicePrior, EpistemicNetworkWithPrior, RandomIndexMLP
from lightning_uq.networks.priors.members import NetworkWithPrior
from lightning_uq.networks.priors.random_features import NullFunction, RandomFeatureGP, gp_prior
from lightning_uq.networks.scaling import CenteredNetwork, ScaledNetwork
from lightning_uq.networks.spectral_norm import remove_spectral_norm, spectral_normalize

__all__ = [
    "MLP",
    "AdditivePrior",
    "BatchEnsembleNetwork",
    "BayesByBackpropNetwork",
    "CatMLPEnsemble",
    "CategoricalRegressionNetwork",
    "CenteredNetwork",
    "ChoicePrior",
    "DeterministicNetwork",
    "DirichletIndexer",
    "DropoutNetwork",
    "EnsembleIndexer",
    "EnsembleNetwork",
    "Epinet",
    "EpinetHead",
    "EpinetNetwork",
    "EpistemicNetwork",
    "EpistemicNetworkWithPrior",
    "Factory",
    "GaussianIndexer",
    "GaussianNoiseMLP",
    "GaussianWithUnitIndexer",
    "HypermodelNetwork",
    "IndexMLP",
    "Indexer",
    "LoraEnsembleNetwork",
    "NetworkWithPrior",
    "NullFunction",
    "OutputReader",
    "PriorIndependentLayers",
    "ProjectedMLP",
    "RandomFeatureGP",
    "RandomIndexMLP",
    "ScaledGaussianIndexer",
    "ScaledNetwork",
    "SeedIndexer",
    "SharedTrunkNetwork",
    "StackedEnsembleNetwork",
    "TabularNetwork",
    "VmapEnsembleNetwork",
    "backbone",
    "build_ensemble",
    "cifar_conv_prior",
    "default_backbone",
    "export_fitted",
    "freeze_as_buffers",
    "gp_prior",
    "imagenet_conv_prior",
    "imagenet_mlp_prior",
    "index_mlp_with_gp_prior",
    "load_deep_ensembles_state",
    "mlp_prior",
    "remove_spectral_norm",
    "spectral_normalize",
    "truncated_normal_init_",
    "variance_scaling_",
]
