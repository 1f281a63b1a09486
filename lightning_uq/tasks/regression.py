"""Numbers as targets."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_choice
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.metrics import CRPS, RMSE, IntervalCoverage, RegressionNLL
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks.base import OutputShapeError, Progress, Stage, Task, describe, sums_and_counts


class RegressionTask(Task):
    """The base of tasks with targets [B, D]: their metrics and the checks of targets.

    Attributes:
        outputs_per_target: Numbers k that the network returns for each target dimension.
        layout: What the k D numbers are, for the error message.
    """

    outputs_per_target: int
    layout: ClassVar[str] = "k blocks of D numbers"
    ood_score: ClassVar[str] = "variance"
    metric_on_bar: ClassVar[str | None] = "rmse"
    has_numeric_targets: ClassVar[bool] = True

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Negative log-density and RMSE; in a test the CRPS and the coverage of the central 95 % interval as well."""
        found: dict[str, Metric] = {"nll": RegressionNLL(validate_args=False), "rmse": RMSE(validate_args=False)}
        if stage == "val":
            return found
        covered = IntervalCoverage(0.95, validate_args=False)
        return {**found, "crps": CRPS(validate_args=False), "coverage_95": covered}

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Outputs [Z, B, k D], k numbers per target dimension."""
        k = self.outputs_per_target
        if outputs.ndim != 3 or outputs.shape[-1] == 0 or outputs.shape[-1] % k:
            raise OutputShapeError(
                f"A network for {describe(self)} must return [B, {k} D], {self.layout}, but it returned shape "
                f"{list(outputs.shape[1:])}. Pass argument `output` a function that makes them."
            )

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Targets are finite floating-point numbers [B, D]."""
        if not target.is_floating_point():
            raise InputError(f"The targets must be floating-point numbers, but they are {target.dtype}.")
        expected = (*outputs.shape[1:-1], outputs.shape[-1] // self.outputs_per_target)
        if target.shape != expected:
            raise InputError(
                f"The targets must have shape {list(expected)}, because the network returns {list(outputs.shape[1:])}, but "
                f"they have {list(target.shape)}; an array of another shape would broadcast."
            )
        if values and not bool(target.isfinite().all()):
            raise InputError("The targets must be finite, but they hold NaN or infinity.")

    def accepts(self, target: Tensor) -> str | None:
        """Targets are floating-point numbers."""
        return None if target.is_floating_point() else "the targets are no floating-point numbers"


@dataclass(frozen=True)
class Regression(RegressionTask):
    """Targets [B, D] under one Gaussian per hypothesis: outputs [Z, B, 2 D], means and then raw variances.

    The variance is softplus(raw) + 1e-6 and the loss the Gaussian negative log-likelihood
    0.5 (log variance + (target - mean)^2 / variance), averaged over all targets of the batch.

    Args:
        head: ``"mean_variance"``.
        loss: ``"gaussian_nll"``.

    Raises:
        InputError: A field is unknown.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474), section 2.2.1.

    Example:
        >>> import torch
        >>> Regression().predict(torch.zeros(5, 2, 4)).mean.shape
        torch.Size([2, 2])
    """

    head: Literal["mean_variance"] = "mean_variance"
    loss: Literal["gaussian_nll"] = "gaussian_nll"

    score_names: ClassVar[tuple[str, ...]] = GaussianMixturePrediction.score_names
    layout: ClassVar[str] = "the means and then the raw variances"

    def __post_init__(self) -> None:
        check_choice("head", self.head, ("mean_variance",))
        check_choice("loss", self.loss, ("gaussian_nll",))

    @property
    def outputs_per_target(self) -> int:  # type: ignore[override]  # the head says it
        """Two: a mean and a raw variance."""
        return 2

    def predict(self, outputs: Tensor) -> GaussianMixturePrediction:
        """An equal-weight mixture of one Gaussian per hypothesis."""
        return GaussianMixturePrediction(*split_gaussian(outputs))

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The Gaussian negative log-likelihood of outputs [B, 2 D]; the counts are D."""
        return sums_and_counts(gaussian_nll_loss(*split_gaussian(output), target, reduction="none"))
