"""Selective prediction over a data set: the most confident rows are answered first."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.functional import selective
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_bool, flatten_classes
from lightning_uq.metrics.base import HasProbs, UncertaintyMetric, prediction_rows


class SelectiveMetric(UncertaintyMetric):
    """Base class of the selective metrics. It keeps each row's certainty -log(1 - largest probability), and whether it is wrong.

    Logits and prediction objects rank all rows: see :func:`~lightning_uq.functional.certainty`. Probabilities rounded to 1 are tied, so
    pass logits if a network is more confident than its dtype resolves (6e-8 in float32, 4e-3 in bfloat16).

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities, which also rank the most confident rows.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits
        self._add_rows("certainty")
        self._add_rows("error", torch.uint8)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities [B, C, ...] (logits with ``from_logits``), or a prediction object.
            target: Class indices [B, ...].

        Raises:
            InputError: The values are not probabilities or indices, or shapes differ.
        """
        rows, labels = prediction_rows(prediction, target, self.from_logits, self.validate_args)
        from_logits = isinstance(prediction, Tensor) and self.from_logits
        logits = prediction if from_logits else getattr(prediction, "log_probs", None)
        if isinstance(logits, Tensor):
            rows = flatten_classes(logits)
            self._append("certainty", selective.certainty(rows))
        else:
            self._append("certainty", -torch.log1p(-widen(rows.amax(1)).clamp_max(1.0)))
        self._append("error", rows.argmax(1) != labels)


class AURC(SelectiveMetric):
    """Area under the risk-coverage curve: the mean, over i, of the error rate among the i most confident rows.

    The order of rows with equal confidence is random, and the value is the expectation over these orders.

    Other libraries integrate the same curve by trapezoids between the coverages 1 / N and 1. torch-uncertainty divides that area by
    1 - 1 / N; fd-shifts multiplies it by 1000 and joins tied rows by one trapezoid. The differences are of the order of 1 / N.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities, which also rank the most confident rows.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Source: Geifman et al., ICLR 2019 (arXiv 1805.08206).

    Example:
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(0.1111, dtype=torch.float64)
    """

    plot_upper_bound: float | None = 1.0

    def compute(self) -> Tensor:
        """The area in [0, 1]; NaN without rows."""
        return selective.aurc(self._rows("certainty"), self._rows("error"))

    def _draw(self, ax: Any) -> None:
        coverage, risk = selective.risk_coverage_curve(self._rows("certainty"), self._rows("error"))
        self._draw_curve(ax, coverage, risk, "coverage", "selective risk", risk.mean())


class AUGRC(SelectiveMetric):
    """Area under the generalized-risk-coverage curve: the mean share of rows that are both answered and wrong; in [0, 1/2].

    It equals (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with the accuracy a and the AUROC of confidence against correctness;
    ties are averaged over their random orders. Unlike the AURC, it does not give the few most confident rows the most weight.
    torch-uncertainty leaves out the coverages below 1 / N and divides by 1 - 1 / N.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities, which also rank the most confident rows.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Source: Traub et al., NeurIPS 2024 (arXiv 2407.01032).

    Example:
        >>> metric = AUGRC()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.1250, dtype=torch.float64)
    """

    plot_upper_bound: float | None = 0.5

    def compute(self) -> Tensor:
        """The area in [0, 1/2]; NaN without rows."""
        return selective.augrc(self._rows("certainty"), self._rows("error"))

    def _draw(self, ax: Any) -> None:
        certainty, error = self._rows("certainty"), self._rows("error")
        coverage, risk = selective.generalized_risk_curve(certainty, error)
        self._draw_curve(ax, coverage, risk, "coverage", "generalized risk", selective.augrc(certainty, error))
