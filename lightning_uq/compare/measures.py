"""The numbers of the table that follow from the scores of single rows: means of one score, and functions of several."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_uq.callbacks.ood_scores import detection_metrics
from lightning_uq.compare.records import Record
from lightning_uq.functional.calibration import bin_statistics, calibration_error
from lightning_uq.tasks.row_scores import NUM_BINS


@dataclass(frozen=True)
class Measure:
    """A number of the table, as a function of the scores of the test rows.

    Attributes:
        key: Its key in the results.
        needs: Names of the row scores that it reads; ``ood_score`` is read of the out-of-distribution rows as well.
        value: The number, of these scores by name; those of the out-of-distribution rows are ``outside``.
        is_mean: Whether it is the mean of its one score.
    """

    key: str
    needs: tuple[str, ...]
    value: Callable[[Mapping[str, Tensor]], float]
    is_mean: bool = False

    def scores(self, record: Record) -> dict[str, Tensor] | None:
        """The scores that the measure reads; None if the record lacks one."""
        found = {name: record.rows[name] for name in self.needs if name in record.rows}
        if "ood_score" in self.needs and "ood_score" in record.outside:
            found["outside"] = record.outside["ood_score"]
        complete = len(found) == len(self.needs) + ("ood_score" in self.needs)
        return found if complete else None


def _mean(key: str, score: str) -> Measure:
    return Measure(key, (score,), lambda scores: float(scores[score].double().nanmean()), is_mean=True)


def _rmse(scores: Mapping[str, Tensor]) -> float:
    return math.sqrt(float(scores["squared_error"].double().nanmean()))


def _ece(scores: Mapping[str, Tensor]) -> float:
    return float(calibration_error(bin_statistics(scores["confidence"], scores["correct"], NUM_BINS)))


def _ece_of_maps(scores: Mapping[str, Tensor]) -> float:
    return float(calibration_error(scores["bins"].sum(0)))


def _miou(scores: Mapping[str, Tensor]) -> float:
    intersection, union = scores["intersection"].sum(0), scores["union"].sum(0)
    return float((intersection / union)[union > 0].mean())


def _detection(key: str) -> Measure:
    def value(scores: Mapping[str, Tensor]) -> float:
        return float(detection_metrics(scores["ood_score"], scores["outside"])[key])

    return Measure(key, ("ood_score",), value)


MEASURES: tuple[Measure, ...] = (
    _mean("accuracy", "correct"),
    _mean("nll", "nll"),
    _mean("brier", "brier"),
    Measure("ece", ("confidence", "correct"), _ece),
    Measure("ece", ("bins",), _ece_of_maps),
    Measure("miou", ("intersection", "union"), _miou),
    Measure("rmse", ("squared_error",), _rmse),
    _mean("mae", "absolute_error"),
    _mean("crps", "crps"),
    _mean("interval_score_90", "interval_score_90"),
    _mean("coverage_90", "covered_90"),
    _mean("width_90", "width_90"),
    _mean("coverage", "in_set"),
    _mean("set_size", "set_size"),
    *(_detection(key) for key in ("ood_auroc", "ood_auprc_out", "ood_auprc_in", "ood_fpr95")),
)
"""All measures. One that reads scores which a record lacks does not apply to it."""


def measured(record: Record) -> dict[str, float]:
    """A record's numbers by result key: those that follow from its rows, and those that it holds.

    Example:
        >>> rows = {"correct": torch.tensor([True, False]), "nll": torch.tensor([0.5, 1.5])}
        >>> measured(Record("softmax", 0, {"parameters": 10.0}, rows, torch.arange(2)))
        {'accuracy': 0.5, 'nll': 1.0, 'parameters': 10.0}
    """
    found = {}
    for measure in MEASURES:
        scores = measure.scores(record)
        if scores is not None:
            found[measure.key] = measure.value(scores)
    return {**found, **record.values}
