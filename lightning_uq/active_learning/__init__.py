"""Active learning and bandits: which unlabelled samples to label next, and which actions to take."""

from lightning_uq.active_learning.bandit import Bandit, thompson_sampling
from lightning_uq.active_learning.loop import Round, acquisition_rounds
from lightning_uq.active_learning.scores import ACQUISITION_SCORES, acquire, score, select

__all__ = [
    "ACQUISITION_SCORES",
    "Bandit",
    "Round",
    "acquire",
    "acquisition_rounds",
    "score",
    "select",
    "thompson_sampling",
]
