"""Adaptive conformal inference: sets and intervals for a stream whose distribution may drift."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.adaptive_conformal import AdaptiveConformal
from lightning_uq.functional.held_out_scores import HeldOutScores
from lightning_uq.functional.validation import check_integer
from lightning_uq.metrics.conformal import covered_targets
from lightning_uq.predictions import Prediction

if TYPE_CHECKING:
    from lightning_uq.callbacks.conformal_intervals import ConformalIntervals
    from lightning_uq.callbacks.conformal_sets import ConformalSets


class ConformalStream:
    """Sets or intervals whose level adapts to the errors of a stream, so that the share of missed targets tends to alpha.

    Call :meth:`predict` for each batch and :meth:`update` once its targets are known. The level alpha_t of the next batch falls after missed
    targets and rises after covered ones. At alpha_t <= 0 everything is covered, and at alpha_t >= 1 nothing is. The scores of the stream are
    added to those of the fit.

    ``ConformalIntervals.stream()`` and ``ConformalSets.stream()`` create a stream from a fitted callback, which does not change.

    Args:
        conformal: The fitted callback, without groups, thresholds per class, or weights.
        step_size: Gamma. A larger value follows a drift faster, but makes the sets vary more.
        window: The number of latest scores to keep; those of the fit count as the oldest. None keeps all.

    Attributes:
        level: alpha_t.

    Raises:
        NotFittedError: The callback is not fitted.
        InputError: An argument is invalid.

    Source: Gibbs & Candes, NeurIPS 2021 (arXiv 2106.00170).

    Example:
        >>> from lightning_uq import ConformalIntervals
        >>> from lightning_uq.predictions import PointPrediction
        >>> prediction = PointPrediction(torch.zeros(1, 99, 1))
        >>> conformal = ConformalIntervals(alpha=0.1).fit_predictions(prediction, torch.linspace(-1, 1, 99))
        >>> stream = conformal.stream(step_size=0.05)
        >>> for y in (3.0, 3.0):  # a shift: the intervals widen
        ...     one = stream.predict(prediction[:1])
        ...     stream.update(one, torch.tensor([y]))
        ...     print(round(float(one.conformal_upper), 2), round(stream.level, 3))
        0.92 0.055
        0.98 0.01
    """

    def __init__(
        self, conformal: "ConformalIntervals | ConformalSets", step_size: float = 0.005, window: int | None = None
    ) -> None:
        if window is not None:
            check_integer("window", window, 1)
        held_out = conformal.held_out
        if held_out.groups is not None or held_out.weights is not None:
            raise InputError(
                f"A stream has one level for all rows, but this {type(conformal).__name__} has groups, classes or weights. Fit one without them."
            )
        if not getattr(conformal, "allow_empty", True):
            raise InputError(
                "A stream needs sets that may be empty. Otherwise fewer targets than alpha are missed, and the level rises without bound. Pass "
                "`allow_empty=True`."
            )
        self.window = window
        self._conformal = conformal
        self._transform = conformal.transform()
        self._state = AdaptiveConformal(conformal.alpha, step_size)
        self._scores = held_out.scores
        self._keep(self._scores)

    @property
    def level(self) -> float:
        """alpha_t, which may lie outside [0, 1]."""
        return self._state.level

    def predict(self, prediction: Prediction) -> Prediction:
        """The prediction with its sets or intervals at the current level."""
        found = self._transform.at(prediction, min(max(self.level, 0.0), 1.0))
        return prediction.replace(**found)

    def update(self, prediction: Prediction, target: Tensor) -> None:
        """Update the level with the targets of a batch.

        Args:
            prediction: The result of :meth:`predict`.
            target: The targets; missing ones (NaN) are ignored.
        """
        covered, known = covered_targets(prediction, target, getattr(self._conformal, "simultaneous", False))
        if bool(known.any()):
            self._state = self._state.update(float(covered[known].double().mean()))
        scores = self._conformal.rows(prediction, target)[0].cpu()
        self._keep(torch.cat([self._scores, scores]))

    def _keep(self, scores: Tensor) -> None:
        self._scores = scores if self.window is None else scores[-self.window :]
        self._transform.use(HeldOutScores(self._scores))

    def state_dict(self) -> dict[str, Any]:
        """The level and the scores as plain data, for a checkpoint."""
        return {"level": self.level, "scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another stream of the same callback."""
        self._state = AdaptiveConformal(self._state.alpha, self._state.step_size, state["level"])
        self._keep(state["scores"])
