"""The settings of an active-learning experiment."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_uq.active_learning import STRATEGIES
from lightning_uq.active_learning.strategies import as_strategy
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.errors import InputError

BASELINE = "random"
DEFAULT_SCORES = (BASELINE, "predictive_entropy", "mutual_information", "epig", "badge", "core_set")


@dataclass(frozen=True)
class ActiveTraining:
    """How each module is trained: Adam for a fixed number of epochs, whose last weights are kept.

    Attributes:
        epochs: Number of epochs.
        samples: Samples drawn in an epoch, for any number of labels.
        batch_size: Samples per batch.
    """

    epochs: int = 20
    samples: int = 640
    batch_size: int = 64

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "samples", "batch_size")


@dataclass(frozen=True)
class ActiveConfiguration:
    """Data, strategies and trainings of an experiment.

    Attributes:
        data: ``"digits"``, ``"mnist"``, ``"dirty_mnist"``, or a path; see :func:`~lightning_uq.compare.active.open_pool`.
        scores: Strategies by name. ``strategy@method`` trains another method than ``method``.
        method: The method that is trained, by its name in the comparison.
        seeds: Number of seeds n, ``seed`` ... ``seed + n - 1``: of the split, the first labels and the trainings.
        seed: The first seed.
        initial: Labels at the beginning, the same number of each class.
        num: Labels that are acquired in each round.
        until: Labels at which the last module is trained.
        training: How each module is trained.
        root: Folder of the files.
        target: Target column of a table.
        network: Backbone; None: one that suits the inputs.

    Raises:
        InputError: A number is out of range, or a name unknown.
    """

    data: str = "digits"
    scores: Sequence[str] = DEFAULT_SCORES
    method: str = "ensemble"
    seeds: int = 5
    seed: int = 0
    initial: int = 20
    num: int = 20
    until: int = 300
    training: ActiveTraining = field(default_factory=ActiveTraining)
    root: str | None = None
    target: Sequence[str] = ()
    network: str | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "seeds", "initial", "num")
        if self.until < self.initial:
            raise InputError(f"`until` must be at least `initial`, {self.initial}, but it is {self.until}.")
        if self.seed < 0 or self.seed + self.seeds > 2**32:
            raise InputError(f"`seed` must lie in [0, 2^32 - {self.seeds}], but it is {self.seed}.")
        if not self.scores:
            raise InputError(f"`scores` must name strategies, such as {','.join(STRATEGIES)}, but it is empty.")
        object.__setattr__(self, "scores", tuple(dict.fromkeys(self.scores)))  # the dataclass is frozen
        for score in self.scores:
            strategy, method = self.parts(score)
            as_strategy(strategy)
            if method not in methods():
                raise InputError(f"The method must be one of {', '.join(methods())}, but it is {method!r}.")

    def parts(self, score: str) -> tuple[str, str]:
        """The strategy and the method of an entry of ``scores``."""
        strategy, _, method = score.partition("@")
        return strategy, method or self.method

    @property
    def num_rounds(self) -> int:
        """Number of trainings of a run."""
        return 1 + math.ceil((self.until - self.initial) / self.num)

    @property
    def recorded(self) -> dict[str, Any]:
        """Everything on which a run's rounds depend, but the seed and the strategy."""
        left_out = ("scores", "method", "seeds", "seed", "until", "root")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def _check_positive(configuration: Any, *names: str) -> None:
    for name in names:
        if getattr(configuration, name) < 1:
            raise InputError(f"`{name}` must be at least 1, but it is {getattr(configuration, name)}.")
