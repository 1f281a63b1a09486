"""What metrics of regression read: a prediction as a distribution of the target."""

from typing import Any, Protocol

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import regression
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating, check_shape
from lightning_uq.predictions import GaussianMixturePrediction


class Distribution(Protocol):
    """A prediction object: the distribution of targets [B, D], one per dimension."""

    @property
    def mean(self) -> Tensor:
        """Mean [B, D]."""

    @property
    def variance(self) -> Tensor:
        """Variance [B, D]."""

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-density [B] of targets [B, D]."""

    def cdf(self, target: Tensor) -> Tensor:
        """Probability [B, D] of at most the target."""

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D]."""

    def to(self, *args: Any, **kwargs: Any) -> "Distribution":
        """A copy in another dtype."""


Predicted = Distribution | tuple[Tensor, Tensor]


def as_distribution(prediction: Predicted, target: Tensor, validate: bool) -> Distribution:
    """The prediction, or the Gaussian mixture of a tuple (mean, variance) of tensors [Z, B, D]; checked with its target."""
    if isinstance(prediction, tuple) and len(prediction) == 2:
        regression.check_mixture(*prediction, target, validate=validate)
        return GaussianMixturePrediction(*prediction)
    if not all(hasattr(prediction, name) for name in ("mean", "log_prob", "cdf", "crps")):
        raise InputError(
            "`prediction` must be a prediction with `mean`, `log_prob`, `cdf` and `crps`, or a tuple (mean, variance) "
            f"of tensors [Z, B, D], but it is a {type(prediction).__name__}."
        )
    found: Distribution = prediction
    check_floating("target", target, 1, "[B, D]")
    check_shape("target", target, found.mean.shape, advice="Another shape would broadcast.")
    if validate:
        for name, value in (("mean", found.mean), ("target", target)):
            if not bool(value.isfinite().all()):
                raise InputError(f"`{name}` must be finite, but it holds NaN or infinity.")
    return found


def probability_integral(prediction: Predicted, target: Tensor, validate: bool) -> Tensor:
    """The probability integral P(Y <= target) [B, D] in float64: close to 1 float32 has too few digits for a comparison."""
    wide = widen(target)
    return widen(as_distribution(prediction, target, validate).to(wide.dtype).cdf(wide))
