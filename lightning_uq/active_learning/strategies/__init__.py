"""Acquisition strategies, one per file: which inputs of a pool to label next."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning_uq.active_learning.strategies.badge import Badge, badge
from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.active_learning.strategies.batch_bald import BatchBALD, batch_bald
from lightning_uq.active_learning.strategies.by_score import ByScore
from lightning_uq.active_learning.strategies.core_set import CoreSet, core_set
from lightning_uq.active_learning.strategies.density_then_entropy import DensityThenEntropy
from lightning_uq.active_learning.strategies.epig import EPIG, epig
from lightning_uq.active_learning.strategies.random_choice import RandomChoice

STRATEGIES: Mapping[str, Callable[[], Strategy]] = MappingProxyType(
    {
        "random": RandomChoice,
        "epig": EPIG,
        "badge": Badge,
        "core_set": CoreSet,
        "batch_bald": BatchBALD,
        "density_then_entropy": DensityThenEntropy,
    }
)
"""Strategies that look at more than a score of each input, by name."""


def as_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy, also by its name: a key of :data:`STRATEGIES`, or a score that :class:`ByScore` takes.

    Example:
        >>> as_strategy("badge").__class__.__name__, as_strategy("margin").score
        ('Badge', 'margin')
    """
    if isinstance(strategy, Strategy):
        return strategy
    return STRATEGIES[strategy]() if strategy in STRATEGIES else ByScore(strategy)


__all__ = [
    "EPIG",
    "STRATEGIES",
    "Badge",
    "BatchBALD",
    "ByScore",
    "CoreSet",
    "DensityThenEntropy",
    "PoolBatch",
    "RandomChoice",
    "Rows",
    "Strategy",
    "as_strategy",
    "badge",
    "batch_bald",
    "core_set",
    "epig",
]
