"""A threshold for the certainty of a classifier's answers that bounds their error rate, for any LightningModule that classifies."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.carried import Carried
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.errors import InputError
from lightning_uq.functional.selective import certainty
from lightning_uq.functional.selective_threshold import selective_threshold
from lightning_uq.functional.validation import check_integer, check_open_unit
from lightning_uq.metrics import AnsweredShare, SelectiveError
from lightning_uq.predictions import ClassProbabilities, Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task, describe


class SelectiveThreshold(HeldOutCallback):
    """The lowest certainty above which at most a share ``risk`` of the answers is wrong, with a probability of at least 1 - delta.

    The threshold is fitted by Learn then Test on the validation rows, which must be independent and distributed like later rows. If no threshold can be
    certified, no row is answered, and a warning says so. The fit needs about log(num_levels / delta) / risk rows without an error.

    Predictions carry ``answered``, bool [B]. A test logs ``uq/test_answered``, the share of answered rows, and
    ``uq/test_selective_error``, their error rate. Callbacks that change probabilities, such as :class:`TemperatureScaling`,
    must stand before this one. An input that is not finite is not answered.

    Args:
        risk: The largest allowed error rate of the answers, in (0, 1).
        delta: The probability of exceeding it, over draws of the validation rows, in (0, 1).
        uncertainty: Name of the predictions' score that ranks rows, the lowest first; None takes the largest probability.
        num_levels: Number of tested thresholds.
        fitting: ``max_rows`` and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``,
            ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: An argument is invalid, or predictions have no such score.

    Source: Angelopoulos et al., "Learn then Test" (arXiv 2110.01052); Geifman & El-Yaniv, NeurIPS 2017 (arXiv 1705.08500).

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> logit = torch.linspace(0, 10, 1001)
        >>> prediction = CategoricalPrediction(torch.stack([logit, -logit], 1).unsqueeze(0))
        >>> target = (torch.arange(1001) < 300).long()  # wrong where the logit is below 3
        >>> selective = SelectiveThreshold(risk=0.1).fit_predictions(prediction, target)
        >>> round(float(selective.answered(prediction).double().mean()), 2)
        0.75
    """

    own_arguments = ("risk", "delta", "uncertainty", "num_levels")

    def __init__(
        self,
        *,
        risk: float = 0.05,
        delta: float = 0.1,
        uncertainty: str | None = None,
        num_levels: int = 32,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        check_open_unit("risk", risk)
        check_open_unit("delta", delta)
        check_integer("num_levels", num_levels, 1)
        self.risk = risk
        self.delta = delta
        self.uncertainty = uncertainty
        self.num_levels = num_levels

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        own = {"risk": self.risk, "delta": self.delta, "uncertainty": self.uncertainty, "num_levels": self.num_levels}
        return {**super().settings, **own}

    def check_task(self, task: Task) -> None:
        """Reject a task without one class per input."""
        if not task.has_classes or task.has_positions:
            why = "the positions of a map are not independent" if task.has_positions else "it has no classes"
            raise InputError(f"SelectiveThreshold needs one class per input, but the task is {describe(task)}: {why}.")

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The certainty of each row [N], and whether its predicted label is wrong."""
        confidence = certainties(prediction, self.uncertainty)
        wrong = prediction.label != target.to(prediction.label.device)
        return confidence, wrong.long()

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The threshold."""
        confidence, wrong = rows
        threshold = selective_threshold(confidence, wrong.bool(), self.risk, self.delta, self.num_levels)
        if bool(threshold.isposinf()):
            rank_zero_warn(
                f"SelectiveThreshold certifies no threshold, so no row is answered. Among {len(wrong)} rows with {int(wrong.sum())} errors, no "
                f"certainty has an error rate of at most risk={self.risk:g} with a probability of {1 - self.delta:g}. Fit more rows, or allow "
                "more risk."
            )
        return {"threshold": threshold}

    @property
    def threshold(self) -> Tensor:
        """The certainty above which rows are answered: -log of the total probability of all other classes, or minus the score named by ``uncertainty``.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["threshold"]
        return found

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The threshold."""
        return {"selective_threshold": float(self.threshold)}

    def transform(self) -> "SelectiveTransform":
        """The transform that adds the mask of answered rows to predictions."""
        return SelectiveTransform(self.threshold, self.uncertainty, self.carried())

    def answered(self, prediction: Prediction) -> Tensor:
        """Whether each prediction is certain enough to be answered: bool [B].

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction is of another kind, or has another calibration than the fitted ones.
        """
        changed: Any = self.change(prediction)
        mask: Tensor = changed.answered
        return mask

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The share of answered rows, and their error rate."""
        return {"answered": AnsweredShare(validate_args=False), "selective_error": SelectiveError(validate_args=False)}


class SelectiveTransform(PredictionTransform):
    """Adds the mask of predictions that are certain enough.

    Args:
        threshold: The certainty above which they are answered.
        uncertainty: See :class:`SelectiveThreshold`.
        carried: The calibrations that a prediction must carry.
    """

    kind = "selective threshold"
    is_last = True

    def __init__(self, threshold: Tensor, uncertainty: str | None, carried: Carried) -> None:
        self.threshold = threshold
        self.uncertainty = uncertainty
        self.carried = carried

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction with its mask of answered rows."""
        confidence = certainties(prediction, self.uncertainty)
        self.carried.check(prediction)
        return prediction.replace(answered=confidence > self.threshold.to(confidence))


def certainties(prediction: Any, uncertainty: str | None) -> Tensor:
    """The certainty of each row [B]; minus infinity if it is NaN."""
    if not isinstance(prediction, ClassProbabilities) or prediction.map_shape:
        what = "holds maps" if isinstance(prediction, ClassProbabilities) else f"is a {type(prediction).__name__}"
        raise InputError(f"`prediction` must hold one class per input, but it {what}.")
    if uncertainty is not None:
        return -prediction.score(uncertainty)
    log_probs = prediction.log_probs
    bad = log_probs.isnan().any(1)
    found = certainty(torch.where(bad[:, None], 0.0, log_probs)).to(log_probs.device)
    return torch.where(bad, -torch.inf, found)
