"""Adaptive conformal inference: a level that follows the errors of a stream whose distribution may drift."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.conformal import conformal_quantile
from lightning_uq.functional.validation import check_closed_unit, check_open_unit, check_positive


@dataclass(frozen=True)
class AdaptiveConformal:
    """The level alpha_t of the next step, which rises after a covered target and falls after a missed one.

    alpha_{t+1} = alpha_t + step_size (alpha - err_t), where err_t is 1 for a missed target and 0 for a covered one. If each threshold
    comes from :meth:`threshold`, the share of missed targets over T steps differs from alpha by at most
    (max(alpha_1, 1 - alpha_1) + step_size) / (step_size T), for any stream, even one that an adversary chooses.

    Objects are immutable: ``state = state.update(covered)``. ``dataclasses.asdict(state)`` returns the state as plain numbers.

    Args:
        alpha: The share of targets that may be missed, in (0, 1).
        step_size: Gamma. A larger step follows a drift faster, but the sizes of the sets vary more.
        current: alpha_t, which may leave [0, 1]; ``alpha`` by default.

    Raises:
        InputError: An argument is out of range.

    Source: Gibbs & Candes, "Adaptive conformal inference under distribution shift", NeurIPS 2021 (arXiv 2106.00170), equation 2 and
    proposition 4.1.

    Example:
        >>> import torch
        >>> state, scores = AdaptiveConformal(alpha=0.1, step_size=0.05), torch.arange(1.0, 100.0)
        >>> state.threshold(scores)
        tensor(90., dtype=torch.float64)
        >>> state = state.update(covered=False)
        >>> round(state.level, 3), state.threshold(scores)
        (0.055, tensor(95., dtype=torch.float64))
    """

    alpha: float = 0.1
    step_size: float = 0.005
    current: float | None = None

    def __post_init__(self) -> None:
        check_open_unit("alpha", self.alpha)
        check_positive(step_size=self.step_size)
        if self.current is not None and not math.isfinite(self.current):
            raise InputError(f"`current` must be finite, but it is {self.current!r}.")

    @property
    def level(self) -> float:
        """alpha_t, the level of the next step."""
        return self.alpha if self.current is None else self.current

    def threshold(self, scores: Tensor) -> Tensor:
        """:func:`~lightning_uq.functional.conformal_quantile` of past scores [N, ...] at alpha_t: [...].

        It is plus infinity if alpha_t <= 0, so that every target is covered, and minus infinity if alpha_t >= 1, so that none is.
        """
        return conformal_quantile(scores, min(max(self.level, 0.0), 1.0))

    def update(self, covered: float) -> AdaptiveConformal:
        """The state after a step.

        Args:
            covered: Whether the target was covered, or the share of a step's targets that were covered, in [0, 1].

        Raises:
            InputError: ``covered`` is not in [0, 1].
        """
        share = float(covered)
        check_closed_unit("covered", share)
        return replace(self, current=self.level + self.step_size * (self.alpha - (1 - share)))
