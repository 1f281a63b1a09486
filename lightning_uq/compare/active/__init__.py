"""Active learning by several strategies on the same data: learning curves, their areas, and what beats random acquisition."""

from lightning_uq.compare.active.configuration import DEFAULT_SCORES, ActiveConfiguration, ActiveTraining
from lightning_uq.compare.active.data import PoolData, open_pool
from lightning_uq.compare.active.results import COLUMNS, ActiveResult, paired_t_test, write
from lightning_uq.compare.active.running import first_labels, run_active

__all__ = [
    "COLUMNS",
    "DEFAULT_SCORES",
    "ActiveConfiguration",
    "ActiveResult",
    "ActiveTraining",
    "PoolData",
    "first_labels",
    "open_pool",
    "paired_t_test",
    "run_active",
    "write",
]
