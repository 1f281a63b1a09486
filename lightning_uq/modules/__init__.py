"""Methods as LightningModules, one per file."""

from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.bayes_by_backprop import BayesByBackpropModule
from lightning_uq.modules.categorical_regression import CategoricalRegressionModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.modules.evidential import EvidentialModule
from lightning_uq.modules.evidential_regression import EvidentialRegressionModule
from lightning_uq.modules.hypermodel import HypermodelModule

__all__ = [
    "BayesByBackpropModule",
    "CategoricalRegressionModule",
    "DeterministicModule",
    "DropoutModule",
    "EnsembleModule",
    "EpinetModule",
    "EvidentialModule",
    "EvidentialRegressionModule",
    "HypermodelModule",
    "UncertaintyModule",
]
