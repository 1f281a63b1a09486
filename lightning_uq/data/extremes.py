"""Values so far from all others that they are mistakes: one of them would decide a scale, or a likelihood, alone."""

from typing import Any

import numpy as np

LIMIT = 1e6
"""How many times as far from the center as usual a value may be."""


def extreme_row(values: np.ndarray[Any, np.dtype[np.float64]]) -> int | None:
    """Position of the value furthest from the median, if it is :data:`LIMIT` times as far as the median of the others; else None.

    Values at the median itself are no measure of distance: most of a column may be zeros.

    Args:
        values: Numbers [N]; NaN is a missing one.

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
    "Correct it, or leave the row out. If the values span many orders of magnitude, replace them by their logarithms."
)
