"""Reading a prediction and its targets for the metrics of regression."""

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import regression
from lightning_uq.functional.targets import aligned_target
from lightning_uq.functional.validation import check_floating
from lightning_uq.predictions import GaussianMixturePrediction, NumberPrediction

Predicted = NumberPrediction | tuple[Tensor, Tensor]


def as_distribution(prediction: Predicted, target: Tensor, validate: bool) -> tuple[NumberPrediction, Tensor]:
    """Check a prediction, or a Gaussian mixture as a tuple (mean, variance) of tensors [Z, B, D], and its target; return both.

    NaN in the target marks missing values, which the metrics ignore.
    """
    if isinstance(prediction, tuple) and len(prediction) == 2:
        regression.check_mixture(*prediction, target, validate=validate)
        prediction = GaussianMixturePrediction(*prediction)
    if not isinstance(prediction, NumberPrediction):
        raise InputError(
            "`prediction` must be a prediction of numbers, or a tuple (mean, variance) of tensors [Z, B, D], but it is a "
            f"{type(prediction).__name__}."
        )
    check_floating("target", target, 1, "[B, D]")
    target = aligned_target(target, prediction.target_shape)
    if validate:
        if bool(target.isinf().any()):
            raise InputError("`target` must be finite, or NaN if it is missing, but it holds infinity.")
        if not bool(prediction.point.isfinite().all()):
            raise InputError("`prediction` must be finite, but it holds NaN or infinity.")
    return prediction, target
