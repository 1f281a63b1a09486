"""The heads of a regression, one class per head: the meaning of the outputs for one target."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.losses.heteroscedastic import (
    beta_nll_loss,
    faithful_gaussian_loss,
    gaussian_crps_loss,
    split_log_gaussian,
)
from lightning_uq.losses.mixture_density import mixture_nll_loss, split_mixture
from lightning_uq.losses.point import point_loss
from lightning_uq.losses.quantiles import pinball_loss, split_quantiles
from lightning_uq.losses.student_t import split_student_t, student_t_nll_loss
from lightning_uq.metrics import MAE, RMSE, IntervalCoverage, IntervalScore, PinballLoss
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    NumberPrediction,
    PointPrediction,
    QuantilePrediction,
    StudentTMixturePrediction,
)
from lightning_uq.tasks.base import Stage

if TYPE_CHECKING:
    from lightning_uq.tasks.regression import Regression


class Head(ABC):
    """The meaning of a network's k D outputs, and the losses that fit them.

    Attributes:
        losses: Names of the head's losses, the default first.
        likelihoods: The losses that are negative log-densities.
        layout: What the k D numbers are, for the error message.
        prediction: The type of the predictions.
        ood_score: The default out-of-distribution score.
        metric_on_bar: The validation metric that the progress bar shows.
        needs_members: Whether all scores measure the spread of several hypotheses.
    """

    losses: ClassVar[tuple[str, ...]]
    likelihoods: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[str]
    prediction: ClassVar[type[NumberPrediction]]
    ood_score: ClassVar[str] = "variance"
    metric_on_bar: ClassVar[str] = "rmse"
    needs_members: ClassVar[bool] = False

    @abstractmethod
    def outputs_per_target(self, task: "Regression") -> int:
        """Number k of outputs per target."""

    @abstractmethod
    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> NumberPrediction:
        """The prediction from outputs [Z, B, ..., k D], rescaled by ``scale`` [D] and shifted by ``shift`` [D]."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """The loss [B, ..., D] of outputs [B, ..., k D] and targets [B, ..., D] in the same units."""

    def metrics(self, task: "Regression", stage: Stage) -> dict[str, Metric] | None:
        """The metrics of the head; None for the metrics of a distribution."""
        return None


class MeanHead(Head):
    """One number per target."""

    losses = ("mse", "l1", "huber")
    layout = "one number per target"
    prediction = PointPrediction
    ood_score = "epistemic_variance"
    needs_members = True

    def outputs_per_target(self, task: "Regression") -> int:
        """One."""
        return 1

    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> PointPrediction:
        """One number per hypothesis."""
        return PointPrediction(shift + scale * outputs)

    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """A squared, absolute or Huber loss."""
        return point_loss(output, target, task.loss_name, reduction="none")

    def metrics(self, task: "Regression", stage: Stage) -> dict[str, Metric]:
        """RMSE and MAE: one network gives no others."""
        return {"rmse": RMSE(validate_args=False), "mae": MAE(validate_args=False)}


class MeanVarianceHead(Head):
    """A mean and a raw variance per target: a Gaussian."""

    losses = ("gaussian_nll", "beta_nll", "faithful", "crps")
    likelihoods = ("gaussian_nll",)
    layout = "the means and then the raw variances"
    prediction = GaussianMixturePrediction

    def outputs_per_target(self, task: "Regression") -> int:
        """Two."""
        return 2

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        return split_gaussian(output)

    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> GaussianMixturePrediction:
        """One Gaussian per hypothesis."""
        mean, variance = self.split(outputs)
        return GaussianMixturePrediction(shift + scale * mean, scale.square() * variance)

    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """The likelihood, or a loss that fits the means better."""
        mean, variance = self.split(output)
        if task.loss_name == "beta_nll":
            return beta_nll_loss(mean, variance, target, task.beta, reduction="none")
        losses = {"gaussian_nll": gaussian_nll_loss, "faithful": faithful_gaussian_loss, "crps": gaussian_crps_loss}
        return losses[task.loss_name](mean, variance, target, reduction="none")


class MeanLogVarianceHead(MeanVarianceHead):
    """A mean and a log-variance per target: a Gaussian."""

    layout = "the means and then the log-variances"

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        return split_log_gaussian(output)


class QuantilesHead(Head):
    """A quantile per target and level."""

    losses = ("pinball",)
    layout = "the quantiles of each level in turn"
    prediction = QuantilePrediction
    ood_score = "interval_width"
    metric_on_bar = "pinball"

    def outputs_per_target(self, task: "Regression") -> int:
        """One per level."""
        return len(task.levels)

    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> QuantilePrediction:
        """The quantiles of each hypothesis, sorted if they cross."""
        raw = split_quantiles(outputs, len(task.levels))
        quantiles = shift.unsqueeze(-1) + scale.unsqueeze(-1) * raw.sort(-1).values
        levels = torch.tensor(task.levels, dtype=quantiles.dtype, device=quantiles.device)
        return QuantilePrediction.of_checked(member_quantiles=quantiles, levels=levels)

    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """The mean of the levels' pinball losses."""
        return pinball_loss(split_quantiles(output, len(task.levels)), target, task.levels, reduction="none")

    def metrics(self, task: "Regression", stage: Stage) -> dict[str, Metric]:
        """Pinball loss, and the MAE if the levels include the median; for a test also the outermost central interval."""
        found: dict[str, Metric] = {"pinball": PinballLoss(task.levels, validate_args=False)}
        if task.levels[0] <= 0.5 <= task.levels[-1]:
            found["mae"] = MAE(validate_args=False)
        level = 2 * min(task.levels[-1] - 0.5, 0.5 - task.levels[0])
        if stage == "test" and level > 1e-6:
            name = f"{100 * level:.4g}".replace(".", "_")
            found[f"coverage_{name}"] = IntervalCoverage(level, validate_args=False)
            found[f"interval_score_{name}"] = IntervalScore(level, validate_args=False)
        return found


class StudentTHead(Head):
    """A location, a raw scale and raw degrees of freedom per target: a Student-t."""

    losses = ("student_t_nll",)
    likelihoods = losses
    layout = "the locations, the raw scales and then the raw degrees of freedom"
    prediction = StudentTMixturePrediction

    def outputs_per_target(self, task: "Regression") -> int:
        """Three."""
        return 3

    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> StudentTMixturePrediction:
        """One Student-t per hypothesis."""
        location, spread, df = split_student_t(outputs)
        return StudentTMixturePrediction.of_checked(
            location=shift + scale * location, scale=scale * spread, degrees_of_freedom=df
        )

    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """The likelihood."""
        return student_t_nll_loss(*split_student_t(output), target, reduction="none")


class MixtureHead(Head):
    """Weighted Gaussians per target: a mixture density network."""

    losses = ("mixture_nll",)
    likelihoods = losses
    layout = "the logits, the means and then the raw variances of the components"
    prediction = MixtureDensityPrediction

    def outputs_per_target(self, task: "Regression") -> int:
        """Three per component."""
        return 3 * task.components

    def predict(self, outputs: Tensor, task: "Regression", shift: Tensor, scale: Tensor) -> MixtureDensityPrediction:
        """A mixture per hypothesis."""
        logits, mean, variance = split_mixture(outputs, task.components)
        shift, scale = shift.unsqueeze(-1), scale.unsqueeze(-1)
        return MixtureDensityPrediction.of_checked(
            member_logits=logits, member_mean=shift + scale * mean, member_variance=scale.square() * variance
        )

    def loss(self, output: Tensor, target: Tensor, task: "Regression") -> Tensor:
        """The likelihood."""
        return mixture_nll_loss(*split_mixture(output, task.components), target, reduction="none")


HEADS: dict[str, Head] = {
    "mean": MeanHead(),
    "mean_variance": MeanVarianceHead(),
    "mean_log_variance": MeanLogVarianceHead(),
    "quantiles": QuantilesHead(),
    "student_t": StudentTHead(),
    "mixture": MixtureHead(),
}
"""The heads by name."""
