"""Scores of each test row, which a comparison averages and draws: see :meth:`~lightning_uq.tasks.base.Task.row_scores`."""

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
from lightning_uq.predictions import ClassProbabilities, NumberPrediction

INTERVAL_LEVEL = 0.9
"""Share of probability in the intervals that are scored."""

NUM_BINS = 15
"""Bins of a calibration error."""


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
        "confidence": widen(prediction.confidence),
        "certainty": certainty(prediction.log_probs),
    }


def map_row_scores(prediction: ClassProbabilities, target: Tensor) -> dict[str, Tensor]:
    """Scores [B, ...] of maps of classes, each map a row: means over its positions, and sums for metrics that are no means.

    ``correct``, ``nll`` and ``brier`` [B] are means over the counted positions; a map without one is NaN. ``intersection`` and ``union`` [B, C]
    count positions, and ``bins`` [B, 3, K] are those of :func:`~lightning_uq.functional.calibration.bin_statistics` with K = 15.

    Args:
        prediction: A prediction of maps.
        target: Class indices [B, *P]; -1 does not count.

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
        return values.reshape(num, -1).double().where(counted, torch.nan).nanmean(1)

    num_classes = prediction.probs.shape[1]
    of_label, of_prediction = (
        torch.nn.functional.one_hot(found.flatten(1).clamp_min(0), num_classes).double() * counted.unsqueeze(2)
        for found in (labels, prediction.label)
    )
    intersection = (of_label * of_prediction).sum(1)
    confidence, correct = rows["confidence"].reshape(num, -1), rows["correct"].reshape(num, -1)
    bins = [bin_statistics(confidence[i][counted[i]], correct[i][counted[i]], NUM_BINS) for i in range(num)]
    return {
        **{name: mean(rows[name]) for name in ("correct", "nll", "brier")},
        "intersection": intersection,
        "union": of_label.sum(1) + of_prediction.sum(1) - intersection,
        "bins": torch.stack(bins) if bins else confidence.new_zeros(0, 3, NUM_BINS),
    }


def number_row_scores(prediction: NumberPrediction, target: Tensor) -> dict[str, Tensor]:
    """Scores [N] of predicted numbers, in the units of the targets: those that the prediction has.

    ``squared_error`` and ``absolute_error`` of the mean and the median, ``nll`` (summed over the D targets), ``crps``, and
    ``interval_score_90``, ``covered_90`` and ``width_90`` of the central 90 % interval, or of the one that a conformal callback fitted. ``pit``
    [N, D] is P(Y <= y). Means are over the known targets of a row; a row without one is NaN.

    Args:
        prediction: A prediction of targets [N, D], or [N, H, D] of a horizon.
        target: The targets; NaN marks a missing one.

    Example:
        >>> from lightning_uq.predictions import GaussianMixturePrediction
        >>> prediction = GaussianMixturePrediction(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        >>> {name: round(score.item(), 3) for name, score in number_row_scores(prediction, torch.tensor([[2.0]])).items()}
        {'squared_error': 4.0, 'absolute_error': 2.0, 'nll': 2.919, 'crps': 1.453, 'pit': 0.977, 'covered_90': 0.0, 'width_90': 3.29, 'interval_score_90': 10.393}
    """
    _, known = known_targets(target)

    def mean(values: Tensor) -> Tensor:
        return widen(values).where(known, torch.nan).flatten(1).nanmean(1)

    center = _answer(lambda: prediction.mean)
    scores: dict[str, Tensor] = {} if center is None else {"squared_error": mean((center - target).square())}
    scores["absolute_error"] = mean((prediction.point - target).abs())
    for name, found in (
        ("nll", _answer(lambda: -widen(prediction.log_prob(target)))),
        ("crps", _answer(lambda: mean(prediction.crps(target)))),
        ("pit", _answer(lambda: widen(prediction.cdf(target)).where(known, torch.nan).flatten(1))),
    ):
        if found is not None:
            scores[name] = found
    interval = _interval(prediction)
    if interval is not None:
        lower, upper = interval
        covered = ((lower <= target) & (target <= upper)).double()
        scores["covered_90"], scores["width_90"] = mean(covered), mean(upper - lower)
        scores["interval_score_90"] = mean(interval_score(lower, upper, target, INTERVAL_LEVEL))
    return scores


def _interval(prediction: NumberPrediction) -> tuple[Tensor, Tensor] | None:
    if prediction.has("conformal_lower"):
        return prediction.conformal_lower, prediction.conformal_upper
    found: tuple[Tensor, Tensor] | None = _answer(lambda: prediction.interval(INTERVAL_LEVEL))
    return found


def _answer(question: Callable[[], Any]) -> Any:
    """What a prediction answers; None where it refuses, because a mean or a few quantiles do not determine it."""
    try:
        return question()
    except InputError:
        return None
