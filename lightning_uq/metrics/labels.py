"""Metrics of binary labels, one or several per input; unknown labels are left out."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import InputError
from lightning_uq.functional import ood
from lightning_uq.functional.calibration import calibration_error
from lightning_uq.functional.label_calibration import label_bin_statistics
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_floating, check_integer, check_no_nan, check_shape, describe
from lightning_uq.metrics.base import HasProbs, MeanMetric, UncertaintyMetric


def label_rows(prediction: Tensor | HasProbs, target: Tensor, validate: bool) -> tuple[Tensor, Tensor]:
    """Convert a label metric's ``update`` arguments to logits [N, L] and targets [N, L] with NaN for unknown labels.

    Args:
        prediction: Probabilities of label 1, [N] or [N, L]; a prediction of labels; or a prediction of two classes.
        target: 0 and 1 of any dtype, or probabilities, of the same shape; NaN marks unknown labels.
        validate: Whether to check the values.

    Raises:
        InputError: Shapes differ, or the values are not probabilities.
    """
    if isinstance(prediction, Tensor):
        check_floating("prediction", prediction, 1, "[N] or [N, L]")
        if validate and prediction.numel() and not bool(((prediction >= 0) & (prediction <= 1)).all()):
            raise InputError("`prediction` must hold probabilities in [0, 1], but it holds other numbers or NaN.")
        logits = torch.logit(upcast(prediction))
    else:
        logits = _logits(prediction)
    if target.shape != logits.shape and target.ndim == logits.ndim - 1:
        target = target.unsqueeze(1)  # two classes have one logit, and labels [N]
    check_shape("target", target, logits.shape)
    values = target.to(logits.dtype)
    if validate:
        check_no_nan("prediction", logits)
        known = values[~values.isnan()]
        if not bool(((known >= 0) & (known <= 1)).all()):
            raise InputError("`target` must hold labels 0 and 1, probabilities or NaN, but it holds other values.")
    if logits.ndim == 1:
        logits, values = logits.unsqueeze(1), values.unsqueeze(1)
    return logits, values


def _logits(prediction: HasProbs) -> Tensor:
    pooled = getattr(prediction, "pooled_logits", None)
    if isinstance(pooled, Tensor):
        return pooled
    log_probs = getattr(prediction, "log_probs", None)
    if not isinstance(log_probs, Tensor) or log_probs.ndim != 2 or log_probs.shape[1] != 2:
        raise InputError(
            "`prediction` must be probabilities [N, L], a prediction of labels or a prediction of two classes, but it is "
            f"{describe(log_probs) if isinstance(log_probs, Tensor) else describe(prediction)}."
        )
    return log_probs[:, 1:] - log_probs[:, :1]


def _known(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets with 0 for unknown labels, and the mask of known labels.

    Indexing by a mask would wait for the device, and NaN as a factor would make the gradient NaN.
    """
    known = ~target.isnan()
    return torch.where(known, logits, 0.0), torch.where(known, target, 0.0), known


class LabelNLL(MeanMetric):
    """Mean negative log-likelihood of the known labels, in nats per label; a proper score.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LabelNLL()
        >>> metric.update(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, float("nan")]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    takes_soft_targets = True

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("label_nll", validate_args=validate_args, **kwargs)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :func:`label_rows`."""
        logits, y = label_rows(prediction, target, self.validate_args)
        logits, y, known = _known(logits, y)
        on = torch.where(y > 0, y * F.softplus(-logits), 0.0)
        off = torch.where(y < 1, (1 - y) * F.softplus(logits), 0.0)
        self._add(on + off, known)


class LabelBrierScore(MeanMetric):
    """Mean of (p - y)^2 over the known labels, in [0, 1]; a proper score, and half of the Brier score of two classes.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LabelBrierScore()
        >>> metric.update(torch.tensor([[0.5, 0.25]]), torch.tensor([[1, 0]]))
        >>> metric.compute()
        tensor(0.1562, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    takes_soft_targets = True

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("label_brier_score", validate_args=validate_args, **kwargs)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :func:`label_rows`."""
        logits, y = label_rows(prediction, target, self.validate_args)
        logits, y, known = _known(logits, y)
        self._add((torch.sigmoid(logits) - y).square(), known)


class LabelAccuracy(MeanMetric):
    """Share of the known labels that are right at a threshold of 0.5; targets between 0 and 1 are left out.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LabelAccuracy()
        >>> metric.update(torch.tensor([[0.6, 0.25]]), torch.tensor([[1, 1]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("labels_right", validate_args=validate_args, **kwargs)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :func:`label_rows`."""
        logits, y = label_rows(prediction, target, self.validate_args)
        self._add((logits > 0) == (y == 1), (y == 0) | (y == 1))


class LabelCalibrationError(UncertaintyMetric):
    """Expected calibration error of each label's probability, averaged over the labels that were seen.

    For each label, sum_b n_b / N |frequency_b - mean probability_b| over equal-width bins; the state is three numbers per label and
    bin.

    Args:
        num_bins: Number of bins.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: ``num_bins`` is less than 1.

    Example:
        >>> metric = LabelCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.2], [0.75, 0.2]]), torch.tensor([[1, 0], [0, 0]]))
        >>> metric.compute(), metric.per_label()
        (tensor(0.2250, dtype=torch.float64), tensor([0.2500, 0.2000], dtype=torch.float64))
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    takes_soft_targets = True

    label_bins: Tensor

    def __init__(self, num_bins: int = 15, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_integer("num_bins", num_bins, 1)
        self.num_bins = num_bins
        self._add_sum("label_bins", 3, 1, num_bins)  # one label until the first batch: zeros broadcast

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :func:`label_rows`."""
        logits, y = label_rows(prediction, target, self.validate_args)
        if self.label_bins.shape[1] not in (1, logits.shape[1]):
            raise InputError(
                f"`prediction` must have {self.label_bins.shape[1]} labels as before, but it has {logits.shape[1]}."
            )
        self.label_bins = self.label_bins + label_bin_statistics(torch.sigmoid(logits), y, self.num_bins)

    def statistics(self) -> Tensor:
        """The bins so far, [3, L, num_bins]: number of known labels, number of labels 1, and sum of their probabilities."""
        return self.label_bins

    def per_label(self) -> Tensor:
        """The error of each label [L] in [0, 1]; NaN for a label that was never known."""
        return torch.stack([calibration_error(self.label_bins[:, i]) for i in range(self.label_bins.shape[1])])

    def compute(self) -> Tensor:
        """The mean over the labels that were seen; NaN without any."""
        return self.per_label().nanmean()

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A rank without rows does not know the number of labels yet.
        self.label_bins = _widest(self, self.label_bins, 1, dist_sync_fn, process_group)
        super()._sync_dist(dist_sync_fn, process_group)


class _LabelRanking(UncertaintyMetric):
    """Base class of exact metrics that keep every row's logits, averaged over the labels that have both values.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    num_labels: Tensor

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        self._add_rows("label_logit")
        self._add_rows("label_target")
        self.add_state("num_labels", torch.tensor(1), dist_reduce_fx="max")

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :func:`label_rows`. Targets between 0 and 1 are left out."""
        logits, y = label_rows(prediction, target, self.validate_args)
        self._append("label_logit", logits.reshape(-1))
        self._append("label_target", y.reshape(-1))
        self.num_labels = torch.full_like(self.num_labels, logits.shape[1])

    def per_label(self) -> Tensor:
        """The value of each label [L]; NaN for a label without both values."""
        shape = (-1, int(self.num_labels))
        logits, y = self._rows("label_logit").reshape(shape), self._rows("label_target").reshape(shape)
        return torch.stack([self._of_label(logits[:, i], y[:, i]) for i in range(logits.shape[1])])

    def compute(self) -> Tensor:
        """The mean over the labels that have both values; NaN without any."""
        return self.per_label().nanmean()

    def _of_label(self, logits: Tensor, y: Tensor) -> Tensor:
        hard = (y == 0) | (y == 1)
        logits, on = logits[hard], y[hard] == 1
        if not bool(on.any()) or bool(on.all()):
            return logits.new_full((), torch.nan)
        return self._value(logits, on)

    @abstractmethod
    def _value(self, logits: Tensor, on: Tensor) -> Tensor:
        """The value of one label, from its logits [N] and whether each is 1."""


class LabelAUROC(_LabelRanking):
    """Area under the ROC curve of each label, averaged over the labels with both values; exact.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LabelAUROC()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    def _value(self, logits: Tensor, on: Tensor) -> Tensor:
        return ood.auroc(logits, on)


class LabelAveragePrecision(_LabelRanking):
    """Average precision of each label, averaged over the labels with both values; exact, without interpolation.

    Args:
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LabelAveragePrecision()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8333, dtype=torch.float64)
    """

    def _value(self, logits: Tensor, on: Tensor) -> Tensor:
        return ood.average_precision(logits, on, "out")


def _widest(
    metric: UncertaintyMetric, state: Tensor, axis: int, gather: Callable[..., Any], process_group: Any | None
) -> Tensor:
    """A sum of size 1 along an axis, expanded to the largest size of all ranks. Collective: call it on all ranks."""
    own = torch.tensor([state.shape[axis]], device=metric.device)
    widest = max(int(size) for size in gather(own, group=process_group or metric.process_group))
    shape = [-1] * state.ndim
    shape[axis] = widest
    return state.expand(shape) if state.shape[axis] == 1 else state
