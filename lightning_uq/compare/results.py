"""The rows of a comparison's results, from the records of its methods."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.compare.measures import measured
from lightning_uq.compare.records import Record
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.report.table import ALL_COLUMNS


def make_rows(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """One mapping per method: ``{"method": name, key: {"mean": m, "se": s, "seeds": [...]}, ...}``."""
    return [{"method": name, **summarize([measured(record) for record in found])} for name, found in records.items()]


def summarize(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean and standard error over seeds of every key, and each seed's value.

    The error is None with one seed. Mean and error are None where a value is not finite, as such a value itself is: JSON has no NaN.

    Example:
        >>> summarize([{"nll": 1.0}, {"nll": 3.0}])
        {'nll': {'mean': 2.0, 'se': 1.0, 'seeds': [1.0, 3.0]}}
    """
    summary: dict[str, dict[str, Any]] = {}
    for key in (column.key for column in ALL_COLUMNS):
        column = [one[key] for one in values if key in one]
        if not column:
            continue
        seeds = [value if math.isfinite(value) else None for value in column]
        if None in seeds:
            summary[key] = {"mean": None, "se": None, "seeds": seeds}
        else:
            summary[key] = {"mean": statistics.mean(column), "se": standard_error(column), "seeds": seeds}
    return summary
