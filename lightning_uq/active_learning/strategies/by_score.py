"""Acquisition by a score of each input."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_uq.active_learning.scores import LABELLED, check_score, score
from lightning_uq.active_learning.selection import Selection, select_randomly
from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_choice
from lightning_uq.predictions import Prediction


class ByScore(Strategy):
    """The inputs with the highest scores, or a random draw that prefers them.

    Cost: one prediction per input of the pool.

    Args:
        score: A key of :data:`~lightning_uq.active_learning.ACQUISITION_SCORES`; the name of a score of the module's predictions, such as
            ``"log_density"`` of :class:`~lightning_uq.FitGMM`, of which low densities are acquired; or a function of a prediction that
            returns [B].
        selection: How inputs are chosen by their scores; see :func:`~lightning_uq.active_learning.select_randomly`.
        beta: The sharpness of a random selection.
        options: Of the score; see :func:`~lightning_uq.active_learning.score`.

    Raises:
        InputError: The score has no such option, or ``selection`` is unknown.

    Example:
        >>> strategy = ByScore("margin", selection="softrank", beta=4.0)
        >>> strategy.choose((torch.tensor([-0.5, -0.1, -0.9]),), 1, None, torch.Generator().manual_seed(0))
        tensor([1])
    """

    def __init__(
        self,
        score: str | Callable[[Prediction], Tensor] = "mutual_information",
        selection: Selection = "top",
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        check_choice("selection", selection, get_args(Selection))
        if not callable(score):
            check_score(score, options)
        elif options:
            raise InputError(f"The options {sorted(options)} belong to a named score, but `score` is a function.")
        self.score, self.selection, self.beta, self.options = score, selection, beta, options

    def rows(self, batch: PoolBatch) -> Rows:
        """The scores [B]."""
        prediction = batch.prediction
        if callable(self.score):
            return (self.score(prediction),)
        labels = batch.labels if self.score in LABELLED else None
        return (score(self.score, prediction, labels, **self.options),)

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """The highest scores."""
        return select_randomly(pool[0], num, self.selection, self.beta, generator=generator)
