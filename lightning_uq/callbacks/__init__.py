"""Callbacks for any LightningModule, one a file."""

from lightning_uq.callbacks.ood import OODDetection, OODScorer

__all__ = ["OODDetection", "OODScorer"]
