"""Sets of labels, or of classes per map position, that miss at most a given share on average."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.carried import Carried
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.errors import InputError
from lightning_uq.functional.conformal_sets import lac_scores
from lightning_uq.functional.risk_control import false_negative_threshold, risk_threshold
from lightning_uq.functional.validation import check_bool, check_open_unit
from lightning_uq.metrics import ConformalSize, FalseNegativeRate
from lightning_uq.predictions import ClassProbabilities, LabelProbabilities, Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task, describe

LEVELS = torch.linspace(-20.0, 20.0, 2001, dtype=torch.float64)
"""Thresholds to try for maps, so that their pixels need not be kept: log-odds with a step of 0.02."""


class ConformalRiskControl(HeldOutCallback):
    """Sets that miss at most a share ``alpha`` of an input's true labels, or of a map's positions, on average over inputs.

    Conformal risk control of the false negative rate, for any LightningModule with a :class:`~lightning_uq.tasks.Multilabel` or
    :class:`~lightning_uq.tasks.Segmentation` task. The probability threshold is the largest one with an expected share of at most
    alpha. Inputs, rather than positions, must be exchangeable. Inputs without a true label or a counted position are skipped. The fit needs
    at least 1 / alpha - 1 inputs.

    - Several labels: the share of the active labels that are not in the set.
    - Maps: the share of the counted positions whose true class is not in their set.

    Predictions carry ``prediction_set``, bool [B, L] or [B, C, *P]. A test logs ``uq/test_false_negative_rate``, the mean over inputs, and
    ``uq/test_set_size``, the mean number of labels, or of classes per position. :class:`TemperatureScaling` must stand before this one.

    Args:
        alpha: The largest expected share of misses, in (0, 1).
        by_class: Whether the bound holds for each label or class separately. Each has its own threshold, from the inputs that contain it.
        fitting: ``max_rows`` (a number of inputs), and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``,
            ``name``, ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: An argument is invalid.

    Source: Angelopoulos et al., "Conformal risk control", ICLR 2024 (arXiv 2208.02814).

    Example:
        >>> from lightning_uq.predictions import BernoulliPrediction
        >>> logits = torch.tensor([[2.0, 1.0], [3.0, -1.0], [0.5, 4.0]])
        >>> target = torch.tensor([[1, 1], [1, 0], [0, 1]])
        >>> control = ConformalRiskControl(alpha=0.4).fit_predictions(BernoulliPrediction(logits.unsqueeze(0)), target)
        >>> control.sets(BernoulliPrediction(torch.tensor([[[2.5, 0.0]]])))
        tensor([[ True, False]])
    """

    per_sample = True
    own_arguments = ("alpha", "by_class")

    def __init__(self, *, alpha: float = 0.1, by_class: bool = False, **fitting: Any) -> None:
        super().__init__(**fitting)
        check_open_unit("alpha", alpha)
        check_bool("by_class", by_class)
        self.alpha = alpha
        self.by_class = by_class

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, "alpha": self.alpha, "by_class": self.by_class}

    def check_task(self, task: Task) -> None:
        """Reject a task with one label per input, or with numbers."""
        if not task.takes_calibration or (task.has_classes and not task.has_positions):
            other = "ConformalSets" if task.has_classes else "ConformalIntervals"
            raise InputError(
                f"ConformalRiskControl needs several labels per input or maps of labels, but the task is {describe(task)}. Use {other}, or pass "
                "`task=Multilabel()` if each input has several labels."
            )

    # ------------------------------------------------------------------ fitting

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """For labels, their scores [N, L] and whether they are on; for maps, the share of misses at each level [N, 1 or C, K].

        Args:
            prediction: Predictions of several labels, or of maps of classes.
            target: Labels [N, L] that are 0, 1 or NaN (unknown); or classes [N, *P], with -1 for positions that do not count.
            values: Not used.
        """
        scores = scores_of(prediction)
        target = target.to(scores.device)
        if isinstance(prediction, LabelProbabilities):
            return scores, (target == 1).long()
        return (missed_shares(scores, target.long(), self.by_class),)

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The threshold of the scores, a scalar or one per label or class."""
        if len(rows) == 1:
            (shares,) = rows
            columns = [shares[~shares[:, c, 0].isnan(), c] for c in range(shares.shape[1])]
            found = [
                risk_threshold(c, LEVELS, self.alpha) if len(c) else torch.tensor(torch.inf, dtype=torch.float64)
                for c in columns
            ]
            number = shares.shape[1]
        else:
            scores, relevant = rows[0], rows[1].bool()
            number = scores.shape[1]
            parts = [slice(i, i + 1) for i in range(number)] if self.by_class else [slice(None)]
            found = [false_negative_threshold(scores[:, part], relevant[:, part], self.alpha) for part in parts]
        infinite = [i for i, one in enumerate(found) if bool(one.isposinf())]
        if infinite:
            what = f"label or class {infinite}" if self.by_class else "all labels or classes"
            rank_zero_warn(
                f"ConformalRiskControl puts {what} into every set, because there are too few inputs for alpha={self.alpha:g}."
            )
        return {"threshold": torch.stack(found) if self.by_class else found[0], "num_labels": number}

    @property
    def threshold(self) -> Tensor:
        """The threshold of the log-odds log((1 - p) / p): a scalar, [L] or [C]. A label is in the set if its score is at most the threshold.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["threshold"]
        return found

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The threshold, if it is a scalar."""
        return {} if self.by_class else {"risk_threshold": float(self.threshold)}

    # ------------------------------------------------------------------ predictions

    def transform(self) -> "RiskTransform":
        """The transform that adds sets to predictions."""
        return RiskTransform(self.threshold, self.carried())

    def sets(self, prediction: Prediction) -> Tensor:
        """The sets of predictions: bool [B, L], or [B, C, *P] for maps.

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction is of another kind, or has another calibration than the fitted ones.
        """
        changed: Any = self.change(prediction)
        mask: Tensor = changed.prediction_set
        return mask

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The share of misses and the size of the sets."""
        missed = FalseNegativeRate(self.by_class, validate_args=False)
        return {"false_negative_rate": missed, "set_size": ConformalSize(validate_args=False)}


class RiskTransform(PredictionTransform):
    """Adds sets with a controlled risk.

    Args:
        threshold: Of the scores: a scalar, or one per label or class.
        carried: The calibrations that a prediction must carry.
    """

    kind = "set"
    is_last = True

    def __init__(self, threshold: Tensor, carried: Carried) -> None:
        self.threshold = threshold
        self.carried = carried

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction with its sets; a NaN keeps its label in the set."""
        scores = scores_of(prediction)
        self.carried.check(prediction)
        bound = self.threshold.to(scores)
        if bound.ndim and len(bound) != scores.shape[1]:
            raise InputError(
                f"`prediction` must have {len(bound)} labels or classes like the fitted ones, but it has {scores.shape[1]}."
            )
        bound = bound.reshape(-1, *[1] * (scores.ndim - 2)) if bound.ndim else bound
        return prediction.replace(prediction_set=~(scores > bound))


def scores_of(prediction: Any) -> Tensor:
    """The score log((1 - p) / p) of each label [B, L] or class [B, C, *P], in float64."""
    if isinstance(prediction, LabelProbabilities):
        return -prediction.pooled_logits.double()
    if not isinstance(prediction, ClassProbabilities) or not prediction.map_shape:
        raise InputError(
            f"`prediction` must predict several labels or maps of classes, but it is a {type(prediction).__name__} with one result per input."
        )
    log_probs = prediction.log_probs
    rows = log_probs.movedim(1, -1)
    bad = ~rows.amax(-1, keepdim=True).isfinite()
    scores = lac_scores(torch.where(bad, 0.0, rows).flatten(0, -2)).reshape(rows.shape)
    return torch.where(bad.to(scores.device), torch.nan, scores).movedim(-1, 1)


def missed_shares(scores: Tensor, target: Tensor, by_class: bool) -> Tensor:
    """The share of the counted positions whose true class has a score above each level: [N, 1 or C, K] in float32.

    Args:
        scores: Scores [N, C, *P] of all classes.
        target: True classes [N, *P]; -1 for positions that do not count.
        by_class: Whether each class has its own share.

    Returns:
        The shares; NaN if no position counts.
    """
    num, classes = scores.shape[:2]
    counted = target >= 0
    own = scores.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    levels = LEVELS.to(scores)
    first = torch.searchsorted(levels, own.contiguous())  # the first level that covers it
    groups = classes if by_class else 1
    sample = torch.arange(num, device=scores.device).reshape(-1, *[1] * (target.ndim - 1)).expand_as(target)
    place = sample * groups + (target if by_class else torch.zeros_like(target))
    width = len(levels) + 1
    counts = torch.bincount((place * width + first)[counted], minlength=num * groups * width).reshape(
        num, groups, width
    )
    total = counts.sum(2, keepdim=True)
    covered = counts[..., :-1].cumsum(2)
    return ((total - covered) / total).float()  # 0 / 0 is NaN
