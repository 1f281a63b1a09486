"""95 % intervals over test rows for the numbers of one trained model."""

import torch
from torch import Tensor

from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.differences import LEVEL, rows_of
from lightning_uq.compare.statistics.measures import MEASURES, Measure
from lightning_uq.errors import InputError
from lightning_uq.functional import resample_metric
from lightning_uq.functional.half_widths import crossed_half_width, t_quantile
from lightning_uq.report.figures.reliability import wilson

_SHARES = (
    "accuracy",
    "subset_accuracy",
    "hamming",
    "auroc",
    "average_precision",
    "iou",
    "coverage",
    "coverage_90",
    "ood_auroc",
    "ood_auprc_out",
    "ood_auprc_in",
    "ood_fpr95",
)
"""Shares in [0, 1], or means of shares."""

_POSITIVE = ("brier", "rmse", "mae", "crps", "interval_score", "width_90", "set_size")
"""Other numbers that are never negative."""

_WORK = 2e8
"""The approximate number of resamples times rows; with many rows, fewer resamples are drawn."""


def value_intervals(record: Record) -> dict[str, tuple[float, float]]:
    """A 95 % interval over test rows for each number of a record that is a function of them, by result key.

    No interval leaves the range of its number. A share has Wilson's interval, for the number of rows that gives its standard error over rows or
    resamples. The interval of a number that is never negative is symmetric in its logarithm, since such numbers have rare large losses. All other
    intervals are symmetric. Numbers that are not finite have none.

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
            except InputError:  # too few rows, or a number that is not finite, which the table does not show either
                continue
    return found


def _interval(measure: Measure, record: Record) -> tuple[float, float]:
    metric, [vectors] = measure.applied([record])
    rows = rows_of(measure, [record], None)
    count = len(next(iter(vectors.values())))
    num_resamples = int(min(2000, max(100, _WORK // count)))
    found = resample_metric(metric, [vectors], rows, num_resamples=num_resamples)
    is_positive = measure.key in _POSITIVE or (measure.key == "nll" and "absolute_error" not in record.rows)
    if found.losses is not None:
        return mean_interval(found.losses[0], is_positive=is_positive)
    assert found.resampled is not None  # with one seed, all other metrics are resampled
    value, error = found.values[0], found.resampled[:, 0].std()
    if measure.key in _SHARES:
        return _share_interval(value, error, rows.fewest)
    lower, upper = _ends(value, _t(rows.fewest) * error, is_positive)
    # A calibration error from few rows is biased upwards, which a logarithm would make worse.
    return (max(lower, 0.0), min(upper, 1.0)) if measure.key == "ece" else (lower, upper)


def mean_interval(values: Tensor, *, is_positive: bool = False, bound: float | None = None) -> tuple[float, float]:
    """A 95 % interval of the mean of rows [N]: Wilson's if each is 0 or 1, else as wide as that of a difference.

    Args:
        values: Numbers [N], N >= 2.
        is_positive: Whether no row can be negative. The interval is then symmetric in the logarithm of the mean.
        bound: The largest possible absolute value of a row, if known. It prevents an interval of width 0 from a few equal rows.

    Example:
        >>> mean_interval(torch.ones(20))[1], round(mean_interval(torch.ones(20))[0], 3)
        (1.0, 0.839)
        >>> mean_interval(torch.tensor([0.1, 0.1, 0.1, 0.9]), is_positive=True)[0] > 0
        True
    """
    values = values.double()
    mean = values.mean()
    if bool(((values == 0) | (values == 1)).all()):
        return _wilson(mean, float(len(values)))
    return _ends(mean, crossed_half_width(values.unsqueeze(0), LEVEL, bound), is_positive)


def _ends(value: Tensor, half_width: Tensor, is_positive: bool) -> tuple[float, float]:
    """The ends of an interval of a value with this half-width to first order."""
    if is_positive and value > 0:
        ratio = torch.exp(half_width / value)
        return float(value / ratio), float(value * ratio)
    return float(value - half_width), float(value + half_width)


def _share_interval(share: Tensor, error: Tensor, num_rows: int) -> tuple[float, float]:
    """Wilson's interval for the number of rows for which a share has this standard error."""
    variance = share * (1 - share)
    if variance <= 0 or error <= 0:  # at 0 or 1, resamples do not differ
        return _wilson(share, float(num_rows))
    return _wilson(share, float(variance / error.square()))


def _wilson(share: Tensor, count: float) -> tuple[float, float]:
    below, above = wilson(share, count)
    return max(0.0, float(share - below)), min(1.0, float(share + above))


def _t(num_rows: int) -> Tensor:
    return t_quantile(LEVEL, torch.tensor(float(num_rows - 1), dtype=torch.float64))
