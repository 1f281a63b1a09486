"""The comparison of methods, as run by ``lightning-uq compare``."""

from lightning_uq.compare.configuration import Configuration, Recipe
from lightning_uq.compare.directory.writing import write
from lightning_uq.compare.interrupts import Interrupted
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.run import Comparison, RunOptions, compare
from lightning_uq.compare.uncertainty_report.callback import UncertaintyReport

__all__ = [
    "Comparison",
    "Configuration",
    "Interrupted",
    "Progress",
    "Recipe",
    "RunOptions",
    "UncertaintyReport",
    "compare",
    "write",
]
