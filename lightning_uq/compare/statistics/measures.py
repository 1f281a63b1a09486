"""The numbers of the table that are functions of scores of the test rows, with a weight for each row.

With equal weights, a measure is the number itself; with resampled weights, it gives the number's interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_uq.compare.records import Record
from lightning_uq.functional.weighted_metrics import (
    weighted_auroc,
    weighted_average_precision,
    weighted_ece,
    weighted_fpr_at_tpr,
    weighted_mean,
    weighted_rmse,
)

Metric = Callable[..., Tensor]
"""A function of scores [N] by name and ``weights`` [R, N] that returns [R]."""


@dataclass(frozen=True)
class Measure:
    """A number of the table as a function of a record.

    Attributes:
        key: The key in the results.
        arguments: For each argument of ``metric``, the name of the row score. A score [N, K] is passed as K arguments ``name_0`` ....
        metric: The function.
        count: The row score with the number of outcomes averaged in a row's score, which is its weight; None if all rows have the same weight.
        is_detection: Whether it measures the detection of out-of-distribution rows; ``metric`` then gets ``score`` and ``is_ood`` of all rows.
    """

    key: str
    arguments: Mapping[str, str]
    metric: Metric
    count: str | None = None
    is_detection: bool = False

    def applies(self, record: Record) -> bool:
        """Whether the record has the scores."""
        return set(self.arguments.values()) <= set(record.rows) and (not self.is_detection or bool(record.outside))

    def applied(self, records: Sequence[Record]) -> tuple[Metric, list[dict[str, Tensor]]]:
        """The function and its arguments for each record, each [N], or [N + N_ood] for a detection.

        If rows have different weights, the function also takes ``count``.
        """
        found = [self._vectors(record) for record in records]
        counts = [self._counts(record) for record in records]
        if bool((torch.cat(counts) == counts[0][:1]).all()):
            return self.metric, found
        # The score of a row without an outcome is NaN, with weight 0.
        kept = [
            {**{name: one.where(count > 0, 0.0) for name, one in vectors.items()}, "count": count}
            for vectors, count in zip(found, counts, strict=True)
        ]
        return partial(_of_counted, metric=self.metric), kept

    def value(self, record: Record) -> float:
        """The number; NaN if a score is NaN."""
        metric, [vectors] = self.applied([record])
        if has_nan(vectors):
            return math.nan
        num = len(next(iter(vectors.values())))
        return float(metric(**vectors, weights=torch.ones(1, num, dtype=torch.float64)))

    def heaviest_row(self, records: Sequence[Record]) -> int | None:
        """The position in the data of the test row with more than half of the sum of absolute scores over all rows; None if there is none.

        Args:
            records: The records of one method, one per seed. The number must be the mean of one score [N], or the root of such a mean.
        """
        (name,) = self.arguments.values()
        counts = torch.cat([self._counts(record) for record in records])
        scores = torch.cat([record.rows[name] for record in records]).double().abs()
        sizes = torch.where(counts > 0, scores * counts, 0.0)
        largest, place = sizes.max(0)
        if not bool(sizes.isfinite().all()) or 2 * largest <= sizes.sum():
            return None
        return int(torch.cat([record.row_ids for record in records])[place])

    def _vectors(self, record: Record) -> dict[str, Tensor]:
        if self.is_detection:
            inside, outside = record.rows["ood_score"], record.outside["ood_score"]
            return {"score": torch.cat([inside, outside]), "is_ood": is_ood(record)}
        found: dict[str, Tensor] = {}
        for argument, name in self.arguments.items():
            score = record.rows[name]
            if score.ndim == 1:
                found[argument] = score
            else:
                found |= {f"{argument}_{k}": one for k, one in enumerate(score.flatten(1).unbind(1))}
        return found

    def _counts(self, record: Record) -> Tensor:
        counts = record.rows.get(self.count or "")
        return torch.ones(len(record.row_ids)) if counts is None else counts


def _of_counted(weights: Tensor, count: Tensor, metric: Metric, **scores: Tensor) -> Tensor:
    """The metric of rows weighted by the number of outcomes averaged in their scores."""
    return metric(**scores, weights=weights * count)


def has_nan(vectors: Mapping[str, Tensor]) -> bool:
    """Whether a score is NaN, as for a diverged network, so that the number cannot be computed."""
    return any(bool(one.isnan().any()) for one in vectors.values())


def is_ood(record: Record) -> Tensor:
    """The mask [N + N_ood] of the out-of-distribution rows, which follow the test rows."""
    num = len(record.row_ids)
    return torch.arange(num + len(record.outside["ood_score"])) >= num


def _mean(key: str, score: str, count: str | None = None) -> Measure:
    return Measure(key, {"value": score}, weighted_mean, count)


def _mean_iou(weights: Tensor, **counts: Tensor) -> Tensor:
    """The mean over classes of summed intersections over summed unions."""
    summed = {name: weights @ count.double() for name, count in counts.items()}
    num_classes = len(counts) // 2
    ratio = torch.stack([summed[f"intersection_{c}"] / summed[f"union_{c}"] for c in range(num_classes)])
    return ratio.nanmean(0)  # a class that neither occurs nor is predicted has no ratio


def _ece_of_bins(weights: Tensor, **bins: Tensor) -> Tensor:
    """The calibration error from counts, hits and summed confidences in bins, in that order."""
    summed = torch.stack([weights @ bins[f"bins_{k}"].double() for k in range(len(bins))])
    count, hits, confidence = summed.reshape(3, -1, len(weights))
    error: Tensor = (hits - confidence).abs().sum(0) / count.sum(0)
    return error


def _labels(scores: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The logits [N] and targets [N] of each label; -1 is unknown."""
    return [(scores[f"logit_{k}"], scores[f"label_{k}"]) for k in range(len(scores) // 2)]


def _hamming(weights: Tensor, **scores: Tensor) -> Tensor:
    """The share of the known labels that are wrong at a threshold of 0.5."""
    wrong, known = _wrong_and_known(scores)
    error: Tensor = (weights @ wrong.double().sum(1)) / (weights @ known.double().sum(1))
    return error


def _subset_accuracy(weights: Tensor, **scores: Tensor) -> Tensor:
    """The share of rows whose known labels are all right, among rows with a known label."""
    wrong, known = _wrong_and_known(scores)
    counted = known.any(1)
    return weighted_mean((~wrong.any(1)).double(), weights * counted)


def _wrong_and_known(scores: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The masks [N, L] of wrong and of known labels; a target that is a probability is not a known label."""
    logits, labels = (torch.stack(one, 1) for one in zip(*_labels(scores), strict=True))
    known = (labels == 0) | (labels == 1)
    return known & ((logits > 0) != (labels == 1)), known


def _ece_of_labels(weights: Tensor, **scores: Tensor) -> Tensor:
    """The calibration error of each label's probability of a 1, averaged over the labels with known values."""
    found = []
    for logit, label in _labels(scores):
        known = label >= 0
        found.append(weighted_ece(torch.sigmoid(logit), label.where(known, 0.0), weights * known))
    return torch.stack(found).nanmean(0)


def _mean_over_labels(weights: Tensor, metric: Metric, **scores: Tensor) -> Tensor:
    """A metric of the ranking of each label's logits, averaged over the labels with both values."""
    values = [
        metric(score=logit, is_ood=label == 1, weights=weights * ((label == 0) | (label == 1)))
        for logit, label in _labels(scores)
    ]
    return torch.stack(values).nanmean(0)


def _of_labels(key: str, metric: Metric) -> Measure:
    return Measure(key, {"logit": "label_logits", "label": "labels"}, metric)


def _of_positives(key: str, metric: Metric) -> Measure:
    return Measure(key, {"score": "positive_logit", "is_ood": "is_positive"}, metric)


def _detection(key: str, metric: Metric) -> Measure:
    return Measure(key, {"score": "ood_score"}, metric, is_detection=True)


MEASURES: tuple[Measure, ...] = (
    _mean("accuracy", "correct", "num_outcomes"),
    _of_labels("subset_accuracy", _subset_accuracy),
    _of_labels("hamming", _hamming),
    _of_positives("auroc", weighted_auroc),
    _of_labels("auroc", partial(_mean_over_labels, metric=weighted_auroc)),
    _of_positives("average_precision", weighted_average_precision),
    _of_labels("average_precision", partial(_mean_over_labels, metric=weighted_average_precision)),
    _mean("nll", "nll", "num_outcomes"),
    _mean("brier", "brier", "num_outcomes"),
    Measure("ece", {"confidence": "confidence", "correct": "correct"}, weighted_ece),
    Measure("ece", {"bins": "bins"}, _ece_of_bins),
    _of_labels("ece", _ece_of_labels),
    Measure("iou", {"intersection": "intersection", "union": "union"}, _mean_iou),
    Measure("rmse", {"squared_error": "squared_error"}, weighted_rmse, "num_targets"),
    _mean("mae", "absolute_error", "num_targets"),
    _mean("crps", "crps", "num_targets"),
    _mean("interval_score", "interval_score_90", "num_targets"),
    _mean("coverage_90", "covered_90", "num_targets"),
    _mean("width_90", "width_90", "num_targets"),
    _mean("coverage", "in_set"),
    _mean("set_size", "set_size"),
    _detection("ood_auroc", weighted_auroc),
    _detection("ood_auprc_out", weighted_average_precision),
    _detection("ood_auprc_in", partial(weighted_average_precision, positive="in")),
    _detection("ood_fpr95", weighted_fpr_at_tpr),
)
"""All measures. A measure does not apply to a record that lacks its scores."""


_UNBOUNDED = ("nll", "rmse", "mae", "crps", "interval_score")


def find_single_rows(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, int]]:
    """Errors that one test row dominates: for their keys, the methods and the position of that row in the data.

    Example:
        >>> rows = {"nll": torch.tensor([0.5, 90.0, 1.5])}
        >>> find_single_rows({"softmax": [Record("softmax", 0, {}, rows, torch.tensor([4, 7, 2]))]})
        {'nll': {'softmax': 7}}
    """
    found: dict[str, dict[str, int]] = {}
    for measure in MEASURES:
        for method, some in records.items():
            if measure.key in _UNBOUNDED and some and all(map(measure.applies, some)):
                row = measure.heaviest_row(some)
                if row is not None:
                    found.setdefault(measure.key, {})[method] = row
    return found


def measured(record: Record) -> dict[str, float]:
    """A record's numbers by result key: those computed from its rows, and its own values.

    Example:
        >>> rows = {"correct": torch.tensor([True, False]), "nll": torch.tensor([0.5, 1.5])}
        >>> measured(Record("softmax", 0, {"parameters": 10.0}, rows, torch.arange(2)))
        {'accuracy': 0.5, 'nll': 1.0, 'parameters': 10.0}
    """
    found: dict[str, Any] = {one.key: one.value(record) for one in MEASURES if one.applies(record)}
    return {**found, **record.values}
