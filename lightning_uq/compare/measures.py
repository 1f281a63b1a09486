"""The numbers of the table that follow from scores of the test rows, as functions of those scores with a weight for each row.

With equal weights a measure is the number itself; with resampled weights it gives the number's interval.
"""

from collections.abc import Callable, Mapping
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
"""Takes scores [N] by name and ``weights`` [R, N]; returns [R]."""


@dataclass(frozen=True)
class Measure:
    """A number of the table as a function of a record.

    Attributes:
        key: Its key in the results.
        arguments: For each argument of ``metric`` the row score that it is. A score [N, K] is handed over as K arguments ``name_0`` ....
        metric: The function.
        is_detection: Whether it tells test rows and out-of-distribution rows apart: then it gets ``score`` and ``is_ood`` of both.
    """

    key: str
    arguments: Mapping[str, str]
    metric: Metric
    is_detection: bool = False

    def applies(self, record: Record) -> bool:
        """Whether the record has the scores."""
        return set(self.arguments.values()) <= set(record.rows) and (not self.is_detection or bool(record.outside))

    def vectors(self, record: Record) -> dict[str, Tensor]:
        """The arguments of ``metric``, each [N], or [N + N_ood] of a detection."""
        if self.is_detection:
            inside, outside = record.rows["ood_score"], record.outside["ood_score"]
            return {"score": torch.cat([inside, outside]), "is_ood": is_ood(record)}
        found: dict[str, Tensor] = {}
        for argument, name in self.arguments.items():
            score = record.rows[name].flatten(1) if record.rows[name].ndim > 1 else record.rows[name]
            columns = (
                {f"{argument}_{k}": one for k, one in enumerate(score.unbind(1))}
                if score.ndim > 1
                else {argument: score}
            )
            found |= columns
        return found

    def value(self, record: Record) -> float:
        """The number."""
        vectors = self.vectors(record)
        num = len(next(iter(vectors.values())))
        return float(self.metric(**vectors, weights=torch.ones(1, num, dtype=torch.float64)))


def is_ood(record: Record) -> Tensor:
    """Which of the test rows and the out-of-distribution rows behind them are the latter [N + N_ood]."""
    num = len(record.row_ids)
    return torch.arange(num + len(record.outside["ood_score"])) >= num


def _mean(key: str, score: str) -> Measure:
    return Measure(key, {"value": score}, weighted_mean)


def _mean_iou(weights: Tensor, **counts: Tensor) -> Tensor:
    """The mean over classes of summed intersections over summed unions."""
    summed = {name: weights @ count.double() for name, count in counts.items()}
    num_classes = len(counts) // 2
    ratio = torch.stack([summed[f"intersection_{c}"] / summed[f"union_{c}"] for c in range(num_classes)])
    return ratio.nanmean(0)  # a class that is neither there nor predicted has no ratio


def _ece_of_bins(weights: Tensor, **bins: Tensor) -> Tensor:
    """The calibration error of counts, hits and summed confidences in bins, one after another."""
    summed = torch.stack([weights @ bins[f"bins_{k}"].double() for k in range(len(bins))])
    count, hits, confidence = summed.reshape(3, -1, len(weights))
    error: Tensor = (hits - confidence).abs().sum(0) / count.sum(0)
    return error


def _detection(key: str, metric: Metric) -> Measure:
    return Measure(key, {"score": "ood_score"}, metric, is_detection=True)


MEASURES: tuple[Measure, ...] = (
    _mean("accuracy", "correct"),
    _mean("nll", "nll"),
    _mean("brier", "brier"),
    Measure("ece", {"confidence": "confidence", "correct": "correct"}, weighted_ece),
    Measure("ece", {"bins": "bins"}, _ece_of_bins),
    Measure("iou", {"intersection": "intersection", "union": "union"}, _mean_iou),
    Measure("rmse", {"squared_error": "squared_error"}, weighted_rmse),
    _mean("mae", "absolute_error"),
    _mean("crps", "crps"),
    _mean("interval_score", "interval_score_90"),
    _mean("coverage_90", "covered_90"),
    _mean("width_90", "width_90"),
    _mean("coverage", "in_set"),
    _mean("set_size", "set_size"),
    _detection("ood_auroc", weighted_auroc),
    _detection("ood_auprc_out", weighted_average_precision),
    _detection("ood_auprc_in", partial(weighted_average_precision, positive="in")),
    _detection("ood_fpr95", weighted_fpr_at_tpr),
)
"""All measures. One that reads scores which a record lacks does not apply to it."""


def measured(record: Record) -> dict[str, float]:
    """A record's numbers by result key: those that follow from its rows, and those that it holds.

    Example:
        >>> rows = {"correct": torch.tensor([True, False]), "nll": torch.tensor([0.5, 1.5])}
        >>> measured(Record("softmax", 0, {"parameters": 10.0}, rows, torch.arange(2)))
        {'accuracy': 0.5, 'nll': 1.0, 'parameters': 10.0}
    """
    found: dict[str, Any] = {one.key: one.value(record) for one in MEASURES if one.applies(record)}
    return {**found, **record.values}
