"""The histogram of probability integrals. NaN marks missing targets, which are left out."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional.pit import pit_counts, pit_distance
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_integer
from lightning_uq.metrics.base import UncertaintyMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution


class PITHistogram(UncertaintyMetric):
    """Distance between the distribution of the targets' probability integrals P(Y <= y) and the uniform one; 0 if calibrated.

    It is half the sum over bins of |share - 1 / bins|. :meth:`plot` draws the histogram: a hump shows variances that are too large,
    a U shows variances that are too small, and a slope shows a bias.

    Args:
        num_bins: Number of equal bins of [0, 1].
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``num_bins`` is not a positive integer.

    Source: Gneiting et al., JRSS B 69 (2007).

    Example:
        >>> metric = PITHistogram(num_bins=2)
        >>> metric.update((torch.zeros(1, 2, 1), torch.ones(1, 2, 1)), torch.tensor([[1.0], [2.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    counts: Tensor

    def __init__(self, num_bins: int = 20, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_integer("num_bins", num_bins, 1)
        self.num_bins = num_bins
        self._add_sum("counts", num_bins)

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        wide = widen(target)
        integral = widen(found.to(wide.dtype).cdf(wide))
        self.counts = self.counts + pit_counts(integral, self.num_bins, ~target.isnan())

    def compute(self) -> Tensor:
        """The distance in [0, 1); NaN without targets."""
        return pit_distance(self.counts)

    def _draw(self, ax: Any) -> None:
        density = (self.counts / self.counts.sum() * self.num_bins).cpu().numpy()
        edges = torch.linspace(0, 1, self.num_bins + 1)[:-1].numpy()
        ax.bar(edges, density, width=1 / self.num_bins, align="edge", edgecolor="white")
        ax.axhline(1, linestyle="--", color="grey")
        title = f"{type(self).__name__} {float(pit_distance(self.counts)):.4f}"
        ax.set(xlabel="probability integral", ylabel="density", xlim=(0, 1), title=title)
