"""Numeric targets with a normal-inverse-gamma as output: a Student-t per target."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_uq.functional.validation import check_at_least, check_choice
from lightning_uq.losses.evidential_regression import (
    NUM_BLOCKS,
    RegressionLoss,
    evidential_regression_loss,
    split_nig,
)
from lightning_uq.predictions import StudentTPrediction
from lightning_uq.tasks.base import Progress
from lightning_uq.tasks.regression_base import RegressionTask
from lightning_uq.tasks.target_scale import (
    TargetScale,
    check_scale_dims,
    checked_scale,
    scale_tensors,
    standardized_target,
)


@dataclass(frozen=True)
class EvidentialRegression(RegressionTask):
    """Targets [B, D] with a normal-inverse-gamma per hypothesis: raw outputs [Z, B, 4 D], or [Z, B, 3 D] for ``"meinert"``.

    Its epistemic uncertainty is a *relative* score: the data do not determine nu, so the regularizer and the optimizer set its
    level (Meinert et al.). The Student-t itself is an ordinary likelihood.

    Args:
        loss: ``"amini"``, ``"scaled"`` or ``"meinert"``; see
            :func:`~lightning_uq.losses.evidential_regression.evidential_regression_loss`.
        reg_factor: Weight of the loss's regularizer.
        target_scale: Mean and standard deviation of the targets, each a number or one number per dimension. The network then works in
            standardised units, as in :class:`~lightning_uq.tasks.Regression`.

    Raises:
        InputError: A field is out of range or unknown.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> import torch
        >>> EvidentialRegression().predict(torch.zeros(1, 3, 4)).epistemic_variance.shape
        torch.Size([3, 1])
    """

    loss: RegressionLoss = "amini"
    reg_factor: float = 0.01
    target_scale: TargetScale | None = None

    ood_score: ClassVar[str] = "epistemic_variance"
    score_names: ClassVar[tuple[str, ...]] = StudentTPrediction.score_names
    layout: ClassVar[str] = "the raw parameters of its loss, D of each"

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, tuple(NUM_BLOCKS))
        check_at_least("reg_factor", self.reg_factor, 0)
        object.__setattr__(self, "target_scale", checked_scale(self.target_scale))

    @property
    def outputs_per_target(self) -> int:  # type: ignore[override]  # depends on the loss
        """Four, or three for ``"meinert"``."""
        return NUM_BLOCKS[self.loss]

    def predict(self, outputs: Tensor) -> StudentTPrediction:
        """An equal-weight mixture of one Student-t per hypothesis."""
        location, nu, alpha, beta = split_nig(outputs, self.loss)  # in range by construction
        mean, std = scale_tensors(self.target_scale, location)
        return StudentTPrediction.of_checked(
            location=mean + std * location, nu=nu, alpha=alpha, beta=std.square() * beta
        )

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for outputs [Z, B, k D], with as many dimensions as ``target_scale``."""
        super().check_output(outputs, values=values)
        check_scale_dims(self.target_scale, outputs.shape[-1] // self.outputs_per_target)

    def losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
        """The evidential loss of raw outputs [B, 4 D]."""
        parameters = split_nig(output, self.loss)
        target = standardized_target(self.target_scale, target)
        return evidential_regression_loss(*parameters, target, self.reg_factor, self.loss, reduction="none")
