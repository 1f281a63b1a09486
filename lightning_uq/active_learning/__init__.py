"""Active learning and bandits: which unlabelled samples to label next, and which actions to take."""

from lightning_uq.active_learning.bandit import Bandit, thompson_sampling
from lightning_uq.active_learning.botorch import as_botorch_model
from lightning_uq.active_learning.loop import Round, acquisition_rounds, read_rounds
from lightning_uq.active_learning.pool import PoolDataModule, balanced_positions
from lightning_uq.active_learning.scores import ACQUISITION_SCORES, acquire, score
from lightning_uq.active_learning.selection import select, select_randomly
from lightning_uq.active_learning.strategies import (
    EPIG,
    STRATEGIES,
    Badge,
    BatchBALD,
    ByScore,
    CoreSet,
    DensityThenEntropy,
    PoolBatch,
    RandomChoice,
    Strategy,
    badge,
    batch_bald,
    core_set,
    epig,
)

__all__ = [
    "ACQUISITION_SCORES",
    "EPIG",
    "STRATEGIES",
    "Badge",
    "Bandit",
    "BatchBALD",
    "ByScore",
    "CoreSet",
    "DensityThenEntropy",
    "PoolBatch",
    "PoolDataModule",
    "RandomChoice",
    "Round",
    "Strategy",
    "acquire",
    "acquisition_rounds",
    "as_botorch_model",
    "badge",
    "balanced_positions",
    "batch_bald",
    "core_set",
    "epig",
    "read_rounds",
    "score",
    "select",
    "select_randomly",
    "thompson_sampling",
]
