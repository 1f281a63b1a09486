"""The pinball loss of predicted quantiles. NaN marks missing targets, which are left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.quantiles import check_levels, pinball
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution


class PinballLoss(MeanMetric):
    """Mean pinball loss of the predicted quantiles at some levels, in the target's units; lower is better.

    Args:
        levels: The levels in (0, 1), in increasing order. They must lie inside the levels of a quantile prediction.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``levels`` are out of range or not increasing.

    Source: Koenker & Bassett, Econometrica 46 (1978).

    Example:
        >>> metric = PinballLoss(levels=(0.5,))
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[1.0], [3.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, levels: Sequence[float] = (0.1, 0.5, 0.9), validate_args: bool = True, **kwargs: Any) -> None:
        self.levels = check_levels(levels)
        name = "_".join(["pinball", *(level.hex().replace(".", "_") for level in self.levels)])
        super().__init__(name, validate_args=validate_args, **kwargs)

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        losses = torch.stack([pinball(found.quantile(level), target, level) for level in self.levels])
        self._add(losses.mean(0), ~target.isnan())
