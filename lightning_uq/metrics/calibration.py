"""Calibration metrics: the agreement of predicted probabilities with observed frequencies."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import InputError
from lightning_uq.functional import calibration, smooth_calibration
from lightning_uq.functional.validation import check_bool, check_choice, check_integer
from lightning_uq.metrics.base import HasProbs, UncertaintyMetric, prediction_rows


class ExpectedCalibrationError(UncertaintyMetric):
    """Binned calibration error: the gap between confidence and accuracy.

    Confidences are binned by (lo, hi]; 0 is in the first bin and 1 in the last. With uniform bins the state is three numbers per
    bin, whatever the size of the data set; equal-mass bins need every confidence. Formulas:
    :func:`lightning_uq.functional.calibration_error`.

    The plug-in estimate is biased upwards: a perfectly calibrated model scores about 0.07 at 200 rows and 0.01 at 10,000.
    ``norm="l2", debiased=True`` is not biased. Neither is a proper score, so report one as well.

    Args:
        num_bins: Number of bins.
        norm: "l1" for the usual ECE, "l2" for the root mean squared gap, "max" for the largest gap of a bin.
        binning: "uniform" for bins of equal width, "adaptive" for bins of equal mass (equal confidences share a bin).
        debiased: Whether to subtract each bin's sampling variance (Kumar et al.); only for ``norm="l2"``.
        classwise: Whether to bin each class's probability, instead of only the top label's.
        from_logits: Whether ``update`` takes logits instead of probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: An argument is unknown or out of range.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017 (arXiv 1706.04599); Nixon et al. (arXiv 1904.01685) for
    adaptive, Kumar et al. (arXiv 1909.10155) for debiased, Kull et al. (arXiv 1910.12656) for class-wise.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    bins: Tensor
    num_classes: Tensor

    def __init__(
        self,
        num_bins: int = 15,
        norm: Literal["l1", "l2", "max"] = "l1",
        binning: Literal["uniform", "adaptive"] = "uniform",
        debiased: bool = False,
        classwise: bool = False,
        from_logits: bool = False,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_integer("num_bins", num_bins, 1)
        check_choice("binning", binning, ("uniform", "adaptive"))
        for name, value in (("debiased", debiased), ("classwise", classwise), ("from_logits", from_logits)):
            check_bool(name, value)
        calibration.check_norm(norm, debiased)
        self.num_bins, self.norm, self.binning = num_bins, norm, binning
        self.debiased, self.classwise, self.from_logits = debiased, classwise, from_logits
        if binning == "uniform":
            # The state has one class until the first class-wise batch: zeros broadcast.
            self._add_sum("bins", 3, 1, num_bins)
        else:
            self._add_rows("confidence")
            self._add_rows("correct", torch.uint8)
            self.add_state("num_classes", torch.tensor(1), dist_reduce_fx="max")

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities [B, C, ...] (logits with ``from_logits``), or a prediction object.
            target: Class indices [B, ...].

        Raises:
            InputError: The values are not probabilities or indices, or shapes differ.
        """
        probs, target = prediction_rows(prediction, target, self.from_logits, self.validate_args)
        confidence, correct = calibration.calibration_pairs(probs, target, self.classwise)
        classes = probs.shape[1] if self.classwise else 1
        seen = self.bins.shape[1] if self.binning == "uniform" else int(self.num_classes)
        if seen not in (1, classes):
            raise InputError(f"`prediction` must have {seen} classes as before, but it has {classes}.")
        if self.binning == "uniform":
            statistics = calibration.bin_statistics(confidence, correct, self.num_bins)
            self.bins = self.bins + statistics.reshape(3, classes, self.num_bins)
        else:
            self._append("confidence", confidence.reshape(-1))
            self._append("correct", correct.reshape(-1))
            self.num_classes = torch.full_like(self.num_classes, classes)

    def compute(self) -> Tensor:
        """The calibration error in [0, 1]; NaN without rows."""
        return calibration.calibration_error(self.statistics(), self.norm, self.debiased)

    def statistics(self) -> Tensor:
        """The bins so far, [3, C or 1, num_bins]: number of rows, number of correct rows, and sum of confidences."""
        if self.binning == "uniform":
            return self.bins
        shape = (-1, int(self.num_classes))
        confidence, correct = self._rows("confidence").reshape(shape), self._rows("correct").reshape(shape)
        return calibration.adaptive_bin_statistics(confidence, correct, self.num_bins)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        if self.binning == "uniform" and self.classwise:
            # A rank without rows does not know the number of classes yet.
            own = torch.tensor([self.bins.shape[1]], device=self.device)
            widest = max(int(width) for width in dist_sync_fn(own, group=process_group or self.process_group))
            if self.bins.shape[1] == 1:
                self.bins = self.bins.expand(-1, widest, -1)
        super()._sync_dist(dist_sync_fn, process_group)

    def _draw(self, ax: Any) -> None:
        statistics = self.statistics()
        count, correct, confidence = statistics.sum(1).cpu()
        filled = count > 0
        accuracy, mean = (correct / count)[filled].numpy(), (confidence / count)[filled].numpy()
        ax.plot([0, 1], [0, 1], linestyle="--", color="grey", label="perfect")
        if self.binning == "uniform":
            centre = ((torch.arange(self.num_bins) + 0.5) / self.num_bins)[filled].numpy()
            ax.bar(centre, accuracy, width=1 / self.num_bins, edgecolor="white", alpha=0.7, label="observed")
        ax.plot(mean, accuracy, marker="o", linestyle="none", markersize=4, color="black", label="at mean confidence")
        value = calibration.calibration_error(statistics, self.norm, self.debiased)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        ax.set_title(f"{type(self).__name__} {float(value):.4f}")
        ax.legend(loc="upper left")


class SmoothCalibrationError(UncertaintyMetric):
    """Smooth calibration error (smECE) of the top label: no bins to choose, and consistent as a measure of calibration.

    Residuals are smoothed with a Gaussian reflected at 0 and 1, whose bandwidth is the fixed point smECE_s = s. The state is a
    grid of 8,193 nodes, whatever the size of the data set. For the definition see
    :func:`lightning_uq.functional.smooth_calibration_error`.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Source: Blasiok & Nakkiran, ICLR 2024 (arXiv 2309.12236).

    Example:
        >>> metric = SmoothCalibrationError()
        >>> metric.update(torch.tensor([[0.25, 0.75]]).expand(100, 2), torch.zeros(100, dtype=torch.long))
        >>> metric.compute().round(decimals=3)
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    residuals: Tensor

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits
        self._add_sum("residuals", 2, smooth_calibration.NUM_CELLS + 1)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :meth:`ExpectedCalibrationError.update`."""
        rows = prediction_rows(prediction, target, self.from_logits, self.validate_args)
        self.residuals = self.residuals + smooth_calibration.residual_grid(*calibration.top_label(*rows))

    def compute(self) -> Tensor:
        """The smooth calibration error in [0, 1]; NaN without rows."""
        return smooth_calibration.smooth_bandwidth(self.residuals)

    def _draw(self, ax: Any) -> None:
        bandwidth = smooth_calibration.smooth_bandwidth(self.residuals)
        residual, density = smooth_calibration.smooth_residual(self.residuals, bandwidth).cpu()
        node = torch.linspace(0, 1, len(density), dtype=density.dtype)
        # With hardly any data the ratio is noise, so only the part with rows is drawn.
        shown = density > 1e-3 * density.amax()
        ax.plot([0, 1], [0, 1], linestyle="--", color="grey", label="perfect")
        ax.plot(node[shown].numpy(), (node + residual / density)[shown].numpy(), label="smoothed accuracy")
        ax.fill_between(node.numpy(), (0.2 * density / density.amax()).numpy(), alpha=0.3, label="density")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        ax.set_title(f"{type(self).__name__} {float(bandwidth):.4f}")
        ax.legend(loc="upper left")
