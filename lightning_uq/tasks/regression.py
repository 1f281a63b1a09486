"""Numeric targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.quantiles import check_levels
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.predictions import NumberPrediction
from lightning_uq.tasks.base import Progress, Stage
from lightning_uq.tasks.regression_base import RegressionTask
from lightning_uq.tasks.regression_heads import HEADS, Head
from lightning_uq.tasks.target_scale import (
    TargetScale,
    check_scale_dims,
    checked_scale,
    scale_tensors,
    standardized_target,
)

HeadName = Literal["mean", "mean_variance", "mean_log_variance", "quantiles", "student_t", "mixture"]
LossName = Literal[
    "mse",
    "l1",
    "huber",
    "gaussian_nll",
    "beta_nll",
    "faithful",
    "crps",
    "pinball",
    "student_t_nll",
    "mixture_nll",
]


@dataclass(frozen=True)
class Regression(RegressionTask):
    """Targets [B, D], or [B, H, D] over a horizon; the head defines what the network's k D outputs mean.

    | head | outputs | losses, the default first | prediction |
    |---|---|---|---|
    | ``"mean"`` | means: k = 1 | ``"mse"``, ``"l1"``, ``"huber"`` | :class:`PointPrediction` |
    | ``"mean_variance"`` | means, raw variances: k = 2 | ``"gaussian_nll"``, ``"beta_nll"``, ``"faithful"``, ``"crps"`` | :class:`GaussianMixturePrediction` |
    | ``"mean_log_variance"`` | means, log-variances: k = 2 | the same | the same |
    | ``"quantiles"`` | one block per level | ``"pinball"`` | :class:`QuantilePrediction` |
    | ``"student_t"`` | locations, raw scales, raw degrees of freedom: k = 3 | ``"student_t_nll"`` | :class:`StudentTMixturePrediction` |
    | ``"mixture"`` | logits, means, raw variances of K components: k = 3 K | ``"mixture_nll"`` | :class:`MixtureDensityPrediction` |

    The k blocks of D numbers are side by side on the last axis. Raw variances and scales go through a softplus. Outputs [B] of
    head ``"mean"`` are read as [B, 1], and a target may lack its last axis if D = 1. Crossing quantiles are allowed: the loss takes
    them as they are, and predictions sort them. NaN marks a missing target. The loss of a batch is the mean over its known
    targets.

    With ``target_scale=(mean, std)`` the network works in standardised units, while batches and predictions are in your units. The
    task standardises targets for the loss, so ``train_loss`` and ``val_loss`` are in standardised units; all other metrics are in
    your units. A module's own argument ``loss`` gets raw outputs, and targets in your units.

    Args:
        head: What the outputs mean.
        loss: Name of the loss; None takes the head's default.
        levels: Levels in (0, 1) of the quantiles, in increasing order.
        components: K of the mixture.
        beta: Power of the variance in ``"beta_nll"``, in [0, 1].
        target_scale: Mean and standard deviation of the targets, each a number or one number per dimension.

    Raises:
        InputError: A field is unknown or out of range, or does not belong to the head.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474), section 2.2.1, for mean and variance; each loss in
    :mod:`lightning_uq.losses` names its own.

    Example:
        >>> Regression().predict(torch.zeros(5, 2, 4)).mean.shape
        torch.Size([2, 2])
        >>> task = Regression(head="quantiles", levels=(0.05, 0.5, 0.95), target_scale=(10.0, 2.0))
        >>> task.predict(torch.tensor([[[-1.0, 0.0, 1.0]]])).interval(0.9)
        (tensor([[8.]]), tensor([[12.]]))
    """

    head: HeadName = "mean_variance"
    loss: LossName | None = None
    levels: Sequence[float] = (0.1, 0.5, 0.9)
    components: int = 5
    beta: float = 0.5
    target_scale: TargetScale | None = None

    def __post_init__(self) -> None:
        check_choice("head", self.head, tuple(HEADS))
        if self.loss is not None:
            check_choice("loss", self.loss, self._head.losses)
        object.__setattr__(self, "levels", check_levels(self.levels))
        check_integer("components", self.components, 1)
        if not 0 <= self.beta <= 1:
            raise InputError(f"`beta` must lie in [0, 1], but it is {self.beta!r}.")
        object.__setattr__(self, "target_scale", checked_scale(self.target_scale))
        for name, default, belongs, owner in (
            ("levels", (0.1, 0.5, 0.9), self.head == "quantiles", "head='quantiles'"),
            ("components", 5, self.head == "mixture", "head='mixture'"),
            ("beta", 0.5, self.loss_name == "beta_nll", "loss='beta_nll'"),
        ):
            if getattr(self, name) != default and not belongs:
                raise InputError(f"`{name}` belongs to {owner}, but head={self.head!r} and loss={self.loss_name!r}.")

    @property
    def _head(self) -> Head:
        return HEADS[self.head]

    @property
    def loss_name(self) -> str:
        """The name of the loss: the given one, or the head's default."""
        return self._head.losses[0] if self.loss is None else self.loss

    @property
    def has_likelihood(self) -> bool:  # type: ignore[override]  # depends on the loss
        """Whether the loss is a negative log-density."""
        return self.loss_name in self._head.likelihoods

    @property
    def needs_members(self) -> bool:  # type: ignore[override]  # depends on the head
        """Whether all scores measure the spread of several hypotheses, as for ``"mean"``."""
        return self._head.needs_members

    @property
    def outputs_per_target(self) -> int:  # type: ignore[override]  # depends on the head
        """Number k of outputs per target."""
        return self._head.outputs_per_target(self)

    @property
    def layout(self) -> str:  # type: ignore[override]  # depends on the head
        """Their meaning and order."""
        return self._head.layout

    @property
    def ood_score(self) -> str:  # type: ignore[override]  # depends on the head
        """The head's default score."""
        return self._head.ood_score

    @property
    def score_names(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the head
        """The scores of the head's predictions."""
        return self._head.prediction.score_names

    @property
    def metric_on_bar(self) -> str:  # type: ignore[override]  # depends on the head
        """The validation metric that the progress bar shows."""
        return self._head.metric_on_bar

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """The head's metrics: errors of a mean, losses and coverage of quantiles, or scores of a distribution."""
        found = self._head.metrics(self, stage)
        return super().metrics(stage) if found is None else found

    def predict(self, outputs: Tensor) -> NumberPrediction:
        """The head's prediction, in the units of the targets."""
        outputs = upcast(self._with_targets(outputs, 3))
        return self._head.predict(outputs, self, *scale_tensors(self.target_scale, outputs))

    def losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
        """The loss of each target, in standardised units if there is a ``target_scale``."""
        output = upcast(self._with_targets(output, 2))
        return self._head.loss(output, standardized_target(self.target_scale, target), self)

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for outputs [Z, B, k D], or [Z, B] for one number per input."""
        outputs = self._with_targets(outputs, 3)
        super().check_output(outputs, values=values)
        check_scale_dims(self.target_scale, outputs.shape[-1] // self.outputs_per_target)

    def _with_targets(self, outputs: Tensor, ndim: int) -> Tensor:
        """Outputs with their last axis, which may be missing for one number per input."""
        return outputs.unsqueeze(-1) if self.outputs_per_target == 1 and outputs.ndim == ndim - 1 else outputs

    def _target_shape(self, output: Tensor) -> torch.Size:
        return super()._target_shape(self._with_targets(output, 2))
