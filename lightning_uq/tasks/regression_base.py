"""The base class of tasks with numeric targets."""

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.targets import aligned_target, known_targets
from lightning_uq.metrics import CRPS, RMSE, IntervalCoverage, RegressionNLL
from lightning_uq.predictions import NumberPrediction
from lightning_uq.tasks.base import OutputShapeError, Progress, Stage, Task, describe, sums_and_counts
from lightning_uq.tasks.row_scores import number_row_scores


class RegressionTask(Task):
    """The base class of tasks with targets [B, D]: metrics, checks of targets, and the treatment of missing targets.

    There may be further axes between B and D, such as the H steps of a horizon: targets [B, H, D] for outputs [B, H, k D]. A
    target may lack its last axis if D = 1: [B], or [B, H]. NaN marks a missing target, which adds nothing to the loss or its
    count, and is ignored by the metrics.

    Attributes:
        outputs_per_target: Number k of outputs per target dimension.
        layout: What the k D numbers are, for the error message.
    """

    outputs_per_target: int
    layout: ClassVar[str] = "k blocks of D numbers"
    ood_score: ClassVar[str] = "variance"
    metric_on_bar: ClassVar[str | None] = "rmse"
    has_numeric_targets: ClassVar[bool] = True

    @abstractmethod
    def losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
        """The loss [B, ..., D] of each target under one index.

        Args:
            output: Raw outputs [B, ..., k D] of one index.
            target: Targets [B, ..., D] without NaN. A missing target is 0 here, and its loss is ignored.
            progress: The progress of the training; None outside a training.
        """

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Sum and number of the known targets' losses."""
        value, known = known_targets(aligned_target(target, self._target_shape(output)))
        losses = upcast(self.losses(output, value, progress))
        return sums_and_counts(torch.where(known, losses, 0.0), known.to(losses.dtype))

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Negative log-density and RMSE; for a test also the CRPS and the coverage of the central 95 % interval."""
        found: dict[str, Metric] = {"nll": RegressionNLL(validate_args=False), "rmse": RMSE(validate_args=False)}
        if stage == "val":
            return found
        covered = IntervalCoverage(0.95, validate_args=False)
        return {**found, "crps": CRPS(validate_args=False), "coverage_95": covered}

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The prediction, and the target with its last axis."""
        known: NumberPrediction = prediction
        return known, aligned_target(target, known.target_shape)

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Errors, likelihood, CRPS and central 90 % interval of each input, as far as the prediction has them."""
        return number_row_scores(*self.rows(prediction, target))

    def outputs_for(self, num_targets: int) -> int:
        """k D."""
        return self.outputs_per_target * num_targets

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for outputs [Z, B, k D], k numbers per target dimension."""
        k = self.outputs_per_target
        if outputs.ndim < 3 or outputs.shape[-1] == 0 or outputs.shape[-1] % k:
            raise OutputShapeError(
                f"A network for {describe(self)} must return [B, {f'{k} D' if k > 1 else 'D'}], {self.layout}, but it returned shape "
                f"{list(outputs.shape[1:])}. {self._advice()}Pass a function that computes them as `output`."
            )

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for floating-point targets [B, D], finite or NaN."""
        if not target.is_floating_point():
            raise InputError(
                f"The targets must be floating-point numbers, but they are {target.dtype}. If they are class labels, pass "
                "`task=Classification()`; otherwise convert them with `.float()`."
            )
        expected = self._target_shape(outputs[0])
        if target.shape != expected and (expected[-1] != 1 or target.shape != expected[:-1]):
            means = target.shape == outputs.shape[1:]
            raise InputError(
                f"The targets must have shape {list(expected)}, because the network returns {list(outputs.shape[1:])}, but "
                f"they have {list(target.shape)}; an array of another shape would broadcast."
                + (f" {self._advice()}".rstrip() if means else "")
            )
        if values and bool(target.isinf().any()):
            raise InputError("The targets must be finite, or NaN if they are missing, but they hold infinity.")
        if values and target.numel() and bool(target.isnan().all()):
            warnings.warn(
                "All targets of a batch are NaN, which marks them as missing, so nothing is learned from it.",
                stacklevel=2,
            )

    def aligned(self, target: Tensor, output: Tensor) -> Tensor:
        """The target with the axes of the output, so that nothing broadcasts."""
        if self.outputs_per_target == 1 and target.numel() == output.numel():
            return target.reshape(output.shape)
        return aligned_target(target, self._target_shape(output))

    def accepts(self, target: Tensor) -> str | None:
        """The reason why a target is not numeric, or None."""
        return None if target.is_floating_point() else "the targets are not floating-point numbers"

    def _target_shape(self, output: Tensor) -> torch.Size:
        """The shape [B, ..., D] of the targets for outputs [B, ..., k D] of one index."""
        return torch.Size([*output.shape[:-1], output.shape[-1] // self.outputs_per_target])

    def _advice(self) -> str:
        """For an error: a sentence with the task for outputs [B, D], and a trailing space."""
        if self.outputs_per_target == 1:
            return ""
        return "If it returns only the D means, pass `task=Regression(head='mean')`. "
