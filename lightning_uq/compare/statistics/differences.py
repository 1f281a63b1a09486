"""Which methods differ significantly: intervals of the differences to the best method and to the baseline, and ties with the best."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.measures import MEASURES, Measure, has_nan, is_ood
from lightning_uq.errors import InputError
from lightning_uq.functional import best_method, metric_difference, resample_metric
from lightning_uq.functional.metric_difference import ResampledMetric
from lightning_uq.functional.paired_difference import DifferenceInterval
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.report.table import ALL_COLUMNS

LEVEL = 0.95

FEW_ROWS = 100
"""With fewer test rows, intervals of skewed losses are noticeably too short: see ``benchmarks/seed_differences.md``."""

_RESAMPLES = 1000
"""Number of resamples, with which chance changes a half-width by 2.2 %."""

_BETTER = {column.key: column.better for column in ALL_COLUMNS}


def find_differences(
    records: Mapping[str, Sequence[Record]], baseline: str, num_train: int | None
) -> dict[str, dict[str, Any]]:
    """For each key of the results, the ties with the best method, and each method's differences to it and to a baseline.

    A key is skipped if it is not a function of the test rows (such as a time), if no direction is better, or if fewer than two methods have it.

    Args:
        records: Each method's records, with the same seeds in the same order.
        baseline: The method with which all others are compared.
        num_train: Number of training samples; None if all seeds have the same test rows.

    Returns:
        By key ``{"best": name, "tied": [names], "same": [names], "rows": number, "to_best": {name: interval}, "to_baseline": {name: interval},
        "left_out": {name: reason}}``. ``"same"`` names the methods with the best one's value for each test row, and ``"rows"`` is the number of test
        rows, or of out-of-distribution rows if they matter and are fewer. An interval is ``{"difference": d, "lower": l, "upper": u, "over": "rows" or "rows and seeds"}``. Intervals to the best have the level of
        :func:`~lightning_uq.functional.best_method`, and those to the baseline 95 %.
    """
    found = {}
    for measure in MEASURES:
        chosen = {name: one for name, one in records.items() if one and all(map(measure.applies, one))}
        if len(chosen) < 2 or _BETTER[measure.key] is None:
            continue
        found[measure.key] = _of_measure(measure, chosen, baseline, num_train)
    return found


def _of_measure(
    measure: Measure, records: Mapping[str, Sequence[Record]], baseline: str, num_train: int | None
) -> dict[str, Any]:
    resampled: dict[str, ResampledMetric] = {}
    scores: dict[str, list[dict[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    rows: SeedRows | None = None
    metric, vectors = measure.applied([one for found in records.values() for one in found])
    for number, (name, found) in enumerate(records.items()):
        rows = rows or rows_of(measure, found, num_train)
        of_method = vectors[number * len(found) : (number + 1) * len(found)]
        if any(map(has_nan, of_method)):
            left_out[name] = "Some scores of its test rows are NaN."
            continue
        try:
            resampled[name], scores[name] = (
                resample_metric(metric, of_method, rows, num_resamples=_RESAMPLES),
                of_method,
            )
        except (
            InputError
        ) as error:  # for example an infinite score: the method has no interval, and the table no number
            left_out[name] = str(error)
    if rows is None or not resampled:
        return {"best": None, "tied": [], "same": [], "to_best": {}, "to_baseline": {}, "left_out": left_out}
    best = best_method(resampled, level=LEVEL, higher_is_better=_BETTER[measure.key] == "higher")
    return {
        "best": best.name,
        "tied": [name for name in resampled if name in best.tied],
        "same": [name for name in best.differences if _are_equal(scores[name], scores[best.name])],
        "rows": rows.fewest,
        "to_best": {name: _plain(one) for name, one in best.differences.items()},
        "to_baseline": {
            name: _plain(metric_difference(one, resampled[baseline], level=LEVEL))
            for name, one in resampled.items()
            if name != baseline and baseline in resampled
        },
        "left_out": left_out,
    }


def _are_equal(a: Sequence[Mapping[str, Tensor]], b: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the scores of each seed's rows are the same."""
    return all(torch.equal(one[name], other[name]) for one, other in zip(a, b, strict=True) for name in one)


def _plain(interval: DifferenceInterval) -> dict[str, Any]:
    return {
        "difference": interval.difference,
        "lower": interval.lower,
        "upper": interval.upper,
        "over": interval.over,
    }


def rows_of(measure: Measure, records: Sequence[Record], num_train: int | None) -> SeedRows:
    """The rows of each seed. Test rows and out-of-distribution rows are resampled separately."""
    if not measure.is_detection:
        return SeedRows([record.row_ids for record in records], num_train=num_train)
    ids = [torch.cat([record.row_ids, torch.arange(len(record.outside["ood_score"]))]) for record in records]
    return SeedRows(ids, [is_ood(record) for record in records], num_train=num_train)
