"""The standard error of a mean over runs."""

import math
import statistics
from collections.abc import Sequence

from torch import Tensor


def standard_error(values: Sequence[float]) -> float | None:
    """s / sqrt(n), with the sample standard deviation s; None for a single value, which has no spread.

    Example:
        >>> standard_error([1.0, 3.0]), standard_error([1.0])
        (1.0, None)
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def standard_errors(values: Tensor) -> Tensor:
    """s / sqrt(n) along the first axis, [n, ...] -> [...], as in :func:`standard_error` for floats.

    Example:
        >>> import torch
        >>> standard_errors(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([1., 0.])
    """
    return values.std(0) / math.sqrt(len(values))
