"""Methods as LightningModules, one a file."""

from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule

__all__ = ["DeterministicModule", "EnsembleModule", "UncertaintyModule"]
