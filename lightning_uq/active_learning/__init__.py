"""Which unlabelled samples to label next."""

from lightning_uq.active_learning.scores import ACQUISITION_SCORES, acquire, score, select

__all__ = ["ACQUISITION_SCORES", "acquire", "score", "select"]
