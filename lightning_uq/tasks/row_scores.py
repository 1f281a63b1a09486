"""Scores of each test row, which a comparison averages and plots: see :meth:`~lightning_uq.tasks.base.Task.row_scores`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import certainty
from lightning_uq.functional.calibration import bin_statistics
from lightning_uq.functional.intervals import interval_score
from lightning_uq.functional.precision import widen
from lightning_uq.functional.targets import known_targets
from lightning_uq.metrics.labels import label_rows
from lightning_uq.predictions import ClassProbabilities, LabelProbabilities, NumberPrediction

INTERVAL_LEVEL = 0.9
"""Nominal coverage of the scored intervals."""

NUM_BINS = 15
"""Number of bins of a calibration error."""


def class_row_scores(prediction: ClassProbabilities, target: Tensor) -> dict[str, Tensor]:
    """Scores [N] of predicted classes: ``correct``, ``nll``, ``brier``, ``confidence`` and ``certainty``.

    Args:
        prediction: A prediction with one row per label.
        target: Class indices [N].

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> class_row_scores(CategoricalPrediction(torch.zeros(1, 2, 2)), torch.tensor([0, 1]))["brier"]
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    probs = widen(prediction.probs)
    hit = torch.nn.functional.one_hot(target, probs.shape[1])
    return {
        "correct": prediction.label == target,
        "nll": -widen(prediction.log_prob(target)),
        "brier": (probs - hit).square().sum(1),
        "confidence": prediction.confidence,  # in its own dtype: a conversion could move it across a bin's edge
        "certainty": certainty(prediction.log_probs),
    }


def binary_row_scores(prediction: ClassProbabilities, target: Tensor) -> dict[str, Tensor]:
    """The scores of :func:`class_row_scores`, the logit [N] of label 1 as ``positive_logit``, and the label as ``is_positive``.

    Args:
        prediction: A prediction of two classes with one row per label.
        target: Class indices [N].

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> scores = binary_row_scores(CategoricalPrediction(torch.tensor([[[0.0, 2.0]]])), torch.tensor([0]))
        >>> scores["positive_logit"].round(decimals=4), scores["is_positive"]
        (tensor([2.]), tensor([False]))
    """
    logits, _ = label_rows(prediction, target, validate=False)
    return {
        **class_row_scores(prediction, target),
        "positive_logit": logits.squeeze(1),
        "is_positive": target == 1,
    }


def label_row_scores(prediction: LabelProbabilities, target: Tensor) -> dict[str, Tensor]:
    """Scores of several labels per row: ``nll`` and ``brier`` [N], means over the ``num_outcomes`` [N] known labels.

    ``label_logits`` and ``labels`` [N, L] are the pooled logits and the targets, with -1 for unknown labels. The means of a row
    without known labels are NaN.

    Args:
        prediction: A prediction of L labels.
        target: The labels [N, L]; NaN marks unknown labels.

    Example:
        >>> from lightning_uq.predictions import BernoulliPrediction
        >>> scores = label_row_scores(BernoulliPrediction(torch.zeros(1, 1, 2)), torch.tensor([[1.0, float("nan")]]))
        >>> scores["brier"], scores["num_outcomes"], scores["labels"]
        (tensor([0.2500], dtype=torch.float64), tensor([1.]), tensor([[ 1., -1.]]))
    """
    logits, labels = label_rows(prediction, target, validate=False)
    known = ~labels.isnan()
    wide, value = widen(logits), widen(torch.where(known, labels, 0.0))
    nll = value * torch.nn.functional.softplus(-wide) + (1 - value) * torch.nn.functional.softplus(wide)
    brier = (widen(torch.sigmoid(logits)) - value).square()
    return {
        "nll": _mean_where(known, nll),
        "brier": _mean_where(known, brier),
        "num_outcomes": known.sum(1).float(),
        "label_logits": logits,
        "labels": torch.where(known, labels, -1.0),
    }


def map_row_scores(prediction: ClassProbabilities, target: Tensor) -> dict[str, Tensor]:
    """Scores [B, ...] of class maps, one map per row: means over its positions, and sums for metrics that are not means.

    ``correct``, ``nll`` and ``brier`` [B] are means over the ``num_outcomes`` [B] positions that count, NaN for a map without one.
    ``intersection`` and ``union`` [B, C] count positions, and ``bins`` [B, 3, K] are those of
    :func:`~lightning_uq.functional.calibration.bin_statistics` with K = 15.

    Args:
        prediction: A prediction of maps.
        target: Class indices [B, *P]; positions with -1 do not count.

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> scores = map_row_scores(CategoricalPrediction(torch.zeros(1, 2, 2, 3)), torch.tensor([[0, 1, 1], [0, -1, 0]]))
        >>> scores["correct"], scores["intersection"]
        (tensor([0.3333, 1.0000], dtype=torch.float64), tensor([[1., 0.],
                [2., 0.]], dtype=torch.float64))
    """
    num, labels = len(target), target.flatten(1)
    counted = labels >= 0
    rows = class_row_scores(prediction.as_rows(), labels.clamp_min(0).reshape(-1))

    def mean(values: Tensor) -> Tensor:
        return _mean_where(counted, values.reshape(num, -1).double())

    classes = torch.arange(prediction.probs.shape[1], device=labels.device)
    of_label, of_prediction = (
        (found.flatten(1).unsqueeze(2) == classes) & counted.unsqueeze(2) for found in (labels, prediction.label)
    )
    confidence, correct = rows["confidence"].reshape(num, -1), rows["correct"].reshape(num, -1)
    bins = [bin_statistics(confidence[i][counted[i]], correct[i][counted[i]], NUM_BINS) for i in range(num)]
    return {
        **{name: mean(rows[name]) for name in ("correct", "nll", "brier")},
        "num_outcomes": counted.sum(1).float(),
        "intersection": (of_label & of_prediction).sum(1).double(),
        "union": (of_label | of_prediction).sum(1).double(),
        "bins": torch.stack(bins) if bins else widen(confidence.new_zeros(0, 3, NUM_BINS)),
    }


def number_row_scores(prediction: NumberPrediction, target: Tensor) -> dict[str, Tensor]:
    """Scores [N] of predicted numbers in the units of the targets, as far as the prediction has them.

    ``squared_error`` and ``absolute_error`` of the mean and the median, ``nll`` (summed over the D targets), ``crps``, and
    ``interval_score_90``, ``covered_90`` and ``width_90`` of the central 90 % interval, or of the interval of a conformal callback.
    ``pit`` [N, D] is P(Y <= y). All but ``nll`` are means over the ``num_targets`` known targets of a row. ``num_outcomes`` is 1 for
    a row with known targets; the scores of other rows are NaN.

    Args:
        prediction: A prediction of targets [N, D], or [N, H, D] of a horizon.
        target: The targets; NaN marks missing targets.

    Example:
        >>> from lightning_uq.predictions import GaussianMixturePrediction
        >>> prediction = GaussianMixturePrediction(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        >>> scores = number_row_scores(prediction, torch.tensor([[2.0]]))
        >>> {name: round(scores[name].item(), 3) for name in ("squared_error", "nll", "crps", "pit", "width_90")}
        {'squared_error': 4.0, 'nll': 2.919, 'crps': 1.453, 'pit': 0.977, 'width_90': 3.29}
    """
    _, known = known_targets(target)
    wide = widen(target)

    def mean(values: Tensor) -> Tensor:
        return _mean_where(known.flatten(1), widen(values).flatten(1))

    center = _if_determined(lambda: prediction.mean)
    scores: dict[str, Tensor] = {"num_targets": known.flatten(1).sum(1).float()}
    scores["num_outcomes"] = (scores["num_targets"] > 0).float()
    if center is not None:
        scores["squared_error"] = mean((widen(center) - wide).square())
    scores["absolute_error"] = mean((widen(prediction.point) - wide).abs())
    for name, found in (
        ("nll", _if_determined(lambda: -widen(prediction.log_prob(target)))),
        ("crps", _if_determined(lambda: mean(prediction.crps(target)))),
        ("pit", _if_determined(lambda: widen(prediction.cdf(target)).where(known, torch.nan).flatten(1))),
    ):
        if found is not None:
            scores[name] = found
    interval = _interval(prediction)
    if interval is not None:
        lower, upper = interval
        is_conformal = prediction.has("conformal_lower")
        covered = (lower <= target) & (target <= upper) if is_conformal else prediction.covered(target, INTERVAL_LEVEL)
        scores["covered_90"], scores["width_90"] = mean(covered), mean(upper - lower)
        scores["interval_score_90"] = mean(interval_score(lower, upper, target, INTERVAL_LEVEL))
    return scores


def number_map_scores(prediction: NumberPrediction, target: Tensor, num: int) -> dict[str, Tensor]:
    """Scores [B] of maps of numbers, one map per row: means of :func:`number_row_scores` over its positions.

    ``nll`` is a mean over the ``num_outcomes`` positions with a known target. ``pit`` is [B, P D].

    Args:
        prediction: The positions as rows [B P, D].
        target: Their targets [B P, D].
        num: B.

    Example:
        >>> from lightning_uq.predictions import PointPrediction
        >>> scores = number_map_scores(PointPrediction(torch.zeros(1, 4, 1)), torch.tensor([[1.0], [2.0], [float("nan")], [4.0]]), 2)
        >>> scores["absolute_error"], scores["num_targets"]
        (tensor([1.5000, 4.0000], dtype=torch.float64), tensor([2., 1.]))
    """
    rows = number_row_scores(prediction, target)
    found: dict[str, Tensor] = {}
    for name, score in rows.items():
        values = score.reshape(num, -1)
        if name.startswith("num_"):
            found[name] = values.sum(1)
        elif name == "pit":
            found[name] = values
        else:
            counts = widen(rows["num_outcomes" if name == "nll" else "num_targets"]).reshape(num, -1)
            found[name] = (values.where(counts > 0, 0.0) * counts).sum(1) / counts.sum(1)
    return found


def _mean_where(counted: Tensor, values: Tensor) -> Tensor:
    """Means [N] of the values [N, K] that count; NaN for a row without any."""
    return torch.where(counted, values, 0.0).sum(1) / counted.sum(1)


def _interval(prediction: NumberPrediction) -> tuple[Tensor, Tensor] | None:
    if prediction.has("conformal_lower"):
        return prediction.conformal_lower, prediction.conformal_upper
    found: tuple[Tensor, Tensor] | None = _if_determined(lambda: prediction.interval(INTERVAL_LEVEL))
    return found


def _if_determined(compute: Callable[[], Any]) -> Any:
    """The result of a call to a prediction; None if it raises because a mean or a few quantiles do not determine it."""
    try:
        return compute()
    except InputError:
        return None
