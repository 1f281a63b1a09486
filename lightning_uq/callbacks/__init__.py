"""Callbacks for any LightningModule, one a file."""

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.ood import OODDetection, OODScorer

__all__ = ["FitGMM", "OODDetection", "OODScorer"]
