"""Sparsification: whether uncertain predictions have large errors. NaN marks missing targets, which are left out."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen
from lightning_uq.functional.sparsification import ause, sparsification_curve
from lightning_uq.functional.validation import check_choice
from lightning_uq.metrics.base import UncertaintyMetric
from lightning_uq.metrics.distribution import Predicted, as_distribution

Uncertainty = Literal["variance", "aleatoric_variance", "epistemic_variance", "interval_width"]


class AUSE(UncertaintyMetric):
    """Area under the sparsification error: the gap to the best possible order in which predictions could be removed.

    Every number of a target counts as a row. Predictions are removed from the most uncertain one on, and the error of the rest is
    compared with the error after removing the largest errors first; both are divided by the error of all predictions. The metric
    stores two numbers per target.

    Args:
        error: ``"rmse"`` or ``"mae"``, of the mean, or of the median of quantiles.
        uncertainty: The uncertainty of each target, an attribute of the prediction: ``"variance"``, ``"aleatoric_variance"``,
            ``"epistemic_variance"``, or ``"interval_width"`` of quantiles.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: An argument is unknown.

    Source: Ilg et al., ECCV 2018 (arXiv 1802.07095).

    Example:
        >>> metric = AUSE(error="mae")
        >>> mean, variance = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
        >>> metric.update((mean, variance), torch.tensor([[4.0], [2.0]]))
        >>> metric.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(
        self,
        error: Literal["rmse", "mae"] = "rmse",
        uncertainty: Uncertainty = "variance",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_choice("error", error, ("rmse", "mae"))
        check_choice(
            "uncertainty", uncertainty, ("variance", "aleatoric_variance", "epistemic_variance", "interval_width")
        )
        self.error, self.uncertainty = error, uncertainty
        self._add_rows("uncertainties")
        self._add_rows("errors")

    def update(self, prediction: Predicted, target: Tensor) -> None:
        """Add a batch; see :meth:`RegressionNLL.update`."""
        found, target = as_distribution(prediction, target, self.validate_args)
        known = ~target.isnan()
        error = (widen(found.point) - widen(target))[known]
        self._append("uncertainties", getattr(found, self.uncertainty)[known])
        self._append("errors", error.square() if self.error == "rmse" else error.abs())

    def compute(self) -> Tensor:
        """The area, at least 0; NaN without targets."""
        return ause(self._rows("uncertainties"), self._rows("errors"), root=self.error == "rmse")

    def _draw(self, ax: Any) -> None:
        uncertainty, error = self._rows("uncertainties"), self._rows("errors")
        root = self.error == "rmse"
        removed = torch.arange(len(error)) / len(error)
        best = sparsification_curve(error, error, root)
        ax.plot(removed.numpy(), (best / best[0]).cpu().numpy(), linestyle="--", color="grey")
        found = sparsification_curve(uncertainty, error, root) / best[0]
        self._draw_curve(ax, removed, found, "share removed", f"{self.error} relative to all", self.compute())
