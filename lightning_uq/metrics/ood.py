"""Detection of out-of-distribution inputs over a data set."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_uq.functional import ood
from lightning_uq.functional.validation import check_choice
from lightning_uq.metrics.base import UncertaintyMetric


class DetectionMetric(UncertaintyMetric):
    """Base class of the detection metrics. It keeps each row's score and label, because all of them are exact.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        self._add_rows("score")
        self._add_rows("is_ood", torch.uint8)

    def update(self, score: Tensor, is_ood: Tensor) -> None:
        """Add a batch.

        Args:
            score: Scores [B]; higher is more out of distribution.
            is_ood: True (or 1) for rows that are out of distribution, [B].

        Raises:
            InputError: Shapes or dtypes do not fit, a score is NaN, or a label is neither 0 nor 1.
        """
        score, is_ood = ood.check_detection(score, is_ood, validate=self.validate_args)
        self._append("score", score)
        self._append("is_ood", is_ood)

    def compute(self) -> Tensor:
        """The value in [0, 1]; NaN, with a warning, if one of the two kinds is missing."""
        is_ood = self._rows("is_ood").bool()
        kinds = {"in-distribution": bool((~is_ood).any()), "out-of-distribution": bool(is_ood.any())}
        missing = [kind for kind, seen in kinds.items() if not seen]
        if missing:
            rank_zero_warn(f"{type(self).__name__} has seen no {' and no '.join(missing)} rows; its value is NaN.")
        return self._value(self._rows("score"), is_ood)

    @abstractmethod
    def _value(self, score: Tensor, is_ood: Tensor) -> Tensor:
        """The value, from scores [N] and whether each row is out of distribution."""


class OODAUROC(DetectionMetric):
    """Area under the ROC curve: P(score_out > score_in) + 1/2 P(score_out = score_in). Exact; 0.5 is chance.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = OODAUROC()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better: bool | None = True

    def _value(self, score: Tensor, is_ood: Tensor) -> Tensor:
        return ood.auroc(score, is_ood)

    def _draw(self, ax: Any) -> None:
        score, is_ood = self._rows("score"), self._rows("is_ood").bool()
        _draw_roc(self, ax, score, is_ood, self._value(score, is_ood))


class OODAUPRC(DetectionMetric):
    """Average precision, sum (R_t - R_{t-1}) P_t over the distinct scores. Exact, without interpolation.

    The two choices of ``positive`` measure different things and are not comparable: chance level is the share of the positive kind.

    Args:
        positive: "out" to detect out-of-distribution rows by a high score, "in" to detect in-distribution rows by a low score.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``positive`` is neither "out" nor "in".

    Example:
        >>> metric = OODAUPRC()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8333, dtype=torch.float64)
    """

    higher_is_better: bool | None = True

    def __init__(self, positive: Literal["out", "in"] = "out", validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_choice("positive", positive, ("out", "in"))
        self.positive = positive

    def _value(self, score: Tensor, is_ood: Tensor) -> Tensor:
        return ood.average_precision(score, is_ood, self.positive)

    def _draw(self, ax: Any) -> None:
        score, is_ood = self._rows("score"), self._rows("is_ood").bool()
        recall, precision = (x.cpu().numpy() for x in ood.precision_recall_curve(score, is_ood, self.positive))
        ax.step(recall, precision, where="pre")
        ax.set(xlabel="recall", ylabel=f'precision ("{self.positive}" is positive)', xlim=(0, 1), ylim=(0, 1.02))
        ax.set_title(f"OODAUPRC {float(self._value(score, is_ood)):.4f}")


class OODFPR95(DetectionMetric):
    """False positive rate at a true positive rate of 95 %; rows tied at the threshold are accepted or rejected together.

    Two different metrics have this name, so say which one you report, and compare it only with the same one:

    - ``positive="in"``: the share of out-of-distribution rows accepted by the smallest threshold, score <= t, that accepts at
      least 95 % of the in-distribution rows.
    - ``positive="out"``: the share of in-distribution rows flagged by the largest threshold, score >= t, that flags at
      least 95 % of the out-of-distribution rows.

    ODIN (Liang et al., ICLR 2018, arXiv 1706.02690) defines "in", the default here. OpenOOD from version 1.5 on and pytorch-ood treat
    out-of-distribution rows as positive, so they report "out".

    Args:
        positive: The kind to detect, "in" or "out".
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``positive`` is neither "in" nor "out".

    Example:
        >>> metric = OODFPR95()
        >>> metric.update(torch.tensor([0.1, 0.2, 0.2, 0.3]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False

    def __init__(self, positive: Literal["out", "in"] = "in", validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_choice("positive", positive, ("out", "in"))
        self.positive = positive

    def _value(self, score: Tensor, is_ood: Tensor) -> Tensor:
        return ood.fpr_at_tpr(score, is_ood, 0.95, self.positive)

    def _draw(self, ax: Any) -> None:
        score, is_ood = self._rows("score"), self._rows("is_ood").bool()
        value = self._value(score, is_ood)
        if self.positive == "in":
            score, is_ood = -score, ~is_ood
        _draw_roc(self, ax, score, is_ood, value)
        ax.axhline(0.95, linestyle=":", color="grey")
        ax.plot([float(value)], [0.95], marker="o", color="black")


def _draw_roc(metric: DetectionMetric, ax: Any, score: Tensor, is_positive: Tensor, value: Tensor) -> None:
    ax.plot([0, 1], [0, 1], linestyle="--", color="grey")
    false, true = (rate.cpu().numpy() for rate in ood.roc_curve(score, is_positive))
    ax.plot(false, true)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.02))
    ax.set_title(f"{type(metric).__name__} {float(value):.4f}")
