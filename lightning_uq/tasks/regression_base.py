"""The base of tasks whose targets are numbers."""

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
    """The base of tasks with targets [B, D]: their metrics, the checks of targets, and what a missing target means.

    There may be further axes between B and D, such as the H steps of a horizon: targets [B, H, D] for outputs [B, H, k D]. A
    target may lack its last axis where D = 1: [B], or [B, H]. A NaN is a missing target. It adds nothing to the loss or its count,
    and no metric counts it.

    Attributes:
        outputs_per_target: Numbers k that the network returns for each target dimension.
        layout: What the k D numbers are, for the error message.
    """

    outputs_per_target: int
    layout: ClassVar[str] = "k blocks of D numbers"
    ood_score: ClassVar[str] = "variance"
    metric_on_bar: ClassVar[str | None] = "rmse"
    has_numeric_targets: ClassVar[bool] = True

    @abstractmethod
    def losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
        """The loss [B, ..., D] of each target under one index; the target is known everywhere.

        Args:
            output: Raw outputs [B, ..., k D] of one index.
            target: Targets [B, ..., D]. A missing one is 0, and its loss is left out.
            progress: How far the training is; None outside a training.
        """

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Sums of the known targets' losses, and their number."""
        value, known = known_targets(aligned_target(target, self._target_shape(output)))
        losses = upcast(self.losses(output, value, progress))
        return sums_and_counts(torch.where(known, losses, 0.0), known.to(losses.dtype))

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Negative log-density and RMSE; in a test the CRPS and the coverage of the central 95 % interval as well."""
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
        """Errors, likelihood, CRPS and the central 90 % interval of each input: those that the prediction has."""
        return number_row_scores(*self.rows(prediction, target))

    def outputs_for(self, num_targets: int) -> int:
        """k D."""
        return self.outputs_per_target * num_targets

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Outputs [Z, B, k D], k numbers per target dimension."""
        k = self.outputs_per_target
        if outputs.ndim < 3 or outputs.shape[-1] == 0 or outputs.shape[-1] % k:
            raise OutputShapeError(
                f"A network for {describe(self)} must return [B, {f'{k} D' if k > 1 else 'D'}], {self.layout}, but it returned shape "
                f"{list(outputs.shape[1:])}. {self._advice()}Pass argument `output` a function that makes them."
            )

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Targets are floating-point numbers [B, D], finite or NaN."""
        if not target.is_floating_point():
            raise InputError(
                f"The targets must be floating-point numbers, but they are {target.dtype}. If they are class labels, pass "
                "`task=Classification()`; else convert them with `.float()`."
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
            raise InputError("The targets must be finite, or NaN where they are missing, but they hold infinity.")
        if values and target.numel() and bool(target.isnan().all()):
            warnings.warn(
                "All targets of a batch are NaN, which marks them as missing, so nothing is learned from it.",
                stacklevel=2,
            )

    def aligned(self, target: Tensor, output: Tensor) -> Tensor:
        """The target with the axes of the output, where nothing broadcasts."""
        if self.outputs_per_target == 1 and target.numel() == output.numel():
            return target.reshape(output.shape)
        return aligned_target(target, self._target_shape(output))

    def accepts(self, target: Tensor) -> str | None:
        """Targets are floating-point numbers."""
        return None if target.is_floating_point() else "the targets are no floating-point numbers"

    def _target_shape(self, output: Tensor) -> torch.Size:
        """The shape [B, ..., D] of the targets beside outputs [B, ..., k D] of one index."""
        return torch.Size([*output.shape[:-1], output.shape[-1] // self.outputs_per_target])

    def _advice(self) -> str:
        """The sentence of an error that names a task for outputs [B, D], with a space behind it."""
        if self.outputs_per_target == 1:
            return ""
        return "If it returns the D means alone, pass `task=Regression(head='mean')`. "
