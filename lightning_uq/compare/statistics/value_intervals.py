"""How well test rows determine a number of one trained model: 95 % intervals over rows."""

import torch
from torch import Tensor

from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.differences import LEVEL, rows_of
from lightning_uq.compare.statistics.measures import MEASURES, Measure
from lightning_uq.errors import InputError
from lightning_uq.functional import resample_metric
from lightning_uq.functional.paired_difference import t_quantile
from lightning_uq.report.figures.reliability import wilson

_SHARES = (
    "accuracy",
    "ece",
    "iou",
    "coverage",
    "coverage_90",
    "ood_auroc",
    "ood_auprc_out",
    "ood_auprc_in",
    "ood_fpr95",
)
"""Numbers that lie in [0, 1]."""

_WORK = 2e8
"""Resamples times rows, about: fewer resamples are drawn of many rows."""


def value_intervals(record: Record) -> dict[str, tuple[float, float]]:
    """A 95 % interval over test rows for each number of a record that is a function of them, by result key.

    A share of rows has Wilson's interval; any other number that of its standard error, over rows or resamples. Numbers that are not finite have none.

    Example:
        >>> record = Record("net", 0, {}, {"correct": torch.arange(100) > 9}, torch.arange(100))
        >>> [round(end, 3) for end in value_intervals(record)["accuracy"]]
        [0.826, 0.945]
    """
    found: dict[str, tuple[float, float]] = {}
    for measure in MEASURES:
        if measure.applies(record):
            try:
                found[measure.key] = _interval(measure, record)
            except InputError:  # too few rows, or a number that is not finite: the table shows no number either
                continue
    return found


def _interval(measure: Measure, record: Record) -> tuple[float, float]:
    metric, [vectors] = measure.applied([record])
    rows = rows_of(measure, [record], None)
    count = len(next(iter(vectors.values())))
    num_resamples = int(min(2000, max(100, _WORK // count)))
    found = resample_metric(metric, [vectors], rows, num_resamples=num_resamples)
    value = found.values[0]
    if found.losses is not None:
        return mean_interval(found.losses[0])
    assert found.resampled is not None  # of one seed, all other metrics are resampled
    half = _t(rows.fewest) * found.resampled[:, 0].std()
    lower, upper = float(value - half), float(value + half)
    return (max(lower, 0.0), min(upper, 1.0)) if measure.key in _SHARES else (lower, upper)


def mean_interval(values: Tensor) -> tuple[float, float]:
    """A 95 % interval of the mean of rows [N]: Wilson's where each is 0 or 1.

    Example:
        >>> mean_interval(torch.ones(20))[1], round(mean_interval(torch.ones(20))[0], 3)
        (1.0, 0.839)
    """
    values = values.double()
    mean, num = values.mean(), len(values)
    if bool(((values == 0) | (values == 1)).all()):
        below, above = wilson(mean, num)
        return max(0.0, float(mean - below)), min(1.0, float(mean + above))
    half = _t(num) * values.std() / num**0.5
    return float(mean - half), float(mean + half)


def _t(num_rows: int) -> Tensor:
    return t_quantile(LEVEL, torch.tensor(float(num_rows - 1), dtype=torch.float64))
