"""The comparison of methods, as ``lightning-uq compare`` runs it."""

from lightning_uq.compare.configuration import Configuration, Recipe
from lightning_uq.compare.files import write
from lightning_uq.compare.run import Comparison, compare
from lightning_uq.compare.training import Progress

__all__ = ["Comparison", "Configuration", "Progress", "Recipe", "compare", "write"]
