"""The comparison of methods, as ``lightning-uq compare`` runs it."""

from lightning_uq.compare.configuration import Configuration, Recipe
from lightning_uq.compare.files import write
from lightning_uq.compare.run import Comparison, compare
from lightning_uq.compare.training import Progress
from lightning_uq.compare.uncertainty_report import UncertaintyReport

__all__ = ["Comparison", "Configuration", "Progress", "Recipe", "UncertaintyReport", "compare", "write"]
