"""Finds values so far from all others that they must be mistakes, since one of them would dominate a scale or a likelihood."""

from typing import Any

import numpy as np

LIMIT = 1e6
"""The largest plausible ratio of a value's distance from the center to the usual distance."""


def extreme_row(values: np.ndarray[Any, np.dtype[np.float64]]) -> int | None:
    """The position of the value furthest from the median, if it is :data:`LIMIT` times as far as the median of the others; else None.

    Values equal to the median do not count for the usual distance, since most of a column may be zeros.

    Args:
        values: Numbers [N]; NaN is a missing value.

    Example:
        >>> extreme_row(np.array([0.0, 0.0, 0.0, 3.0, np.nan, 1e30, 5.0])), extreme_row(np.array([0.0, 0.0, 0.0, 3.0, 1e5]))
        (5, None)
    """
    if not np.isfinite(values).any():
        return None
    distance = np.abs(values - np.nanmedian(values))
    furthest = int(np.nanargmax(distance))
    others = np.delete(distance, furthest)
    others = others[others > 0]
    if len(others) and distance[furthest] > LIMIT * np.median(others):
        return furthest
    return None


WHAT_TO_DO = (
    "Correct it, or remove the row. If the values span many orders of magnitude, replace them by their logarithms."
)
