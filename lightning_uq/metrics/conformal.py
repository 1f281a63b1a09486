"""Metrics of conformal prediction: the share of covered targets, and the size of sets and intervals."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.targets import aligned_target
from lightning_uq.functional.validation import check_no_nan, check_shape, check_target, check_target_values
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.predictions import ClassProbabilities, LabelProbabilities, NumberPrediction, Prediction


class ConformalCoverage(MeanMetric):
    """Share of targets inside their prediction set or conformal interval, in [0, 1]; missing targets (NaN) are left out.

    With ``simultaneous``, an input with a horizon counts as covered if all of its steps are.

    Args:
        simultaneous: Whether the steps of a horizon [B, H, D] count together.
        validate_args: Whether to check that class indices lie in [0, C) and that bounds are not NaN.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> prediction = CategoricalPrediction(torch.zeros(1, 2, 2))
        >>> metric = ConformalCoverage()
        >>> metric.update(prediction.replace(prediction_set=torch.tensor([[True, False], [True, True]])), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, simultaneous: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("covered", validate_args=validate_args, **kwargs)
        self.simultaneous = simultaneous

    def update(self, prediction: Prediction, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: A prediction with a set or an interval.
            target: Class indices [B, ...], or numbers [B, D].

        Raises:
            NotFittedError: The prediction carries neither.
            InputError: The prediction is neither of classes nor of numbers, or the target does not fit it.
        """
        self._add(*covered_targets(prediction, target, self.simultaneous, validate=self.validate_args))


class ConformalSize(MeanMetric):
    """Mean number of classes in a prediction set, or mean width of a conformal interval in the target's units; lower is better.

    An interval whose lower bound exceeds its upper bound is empty and has width 0.

    Args:
        validate_args: Whether to check that bounds are not NaN.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import PointPrediction
        >>> prediction = PointPrediction(torch.zeros(1, 2, 1))
        >>> metric = ConformalSize()
        >>> bounds = {"conformal_lower": -torch.ones(2, 1), "conformal_upper": torch.ones(2, 1)}
        >>> metric.update(prediction.replace(**bounds), torch.zeros(2, 1))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("size", validate_args=validate_args, **kwargs)

    def update(self, prediction: Prediction, target: Tensor) -> None:
        """Add a batch; see :meth:`ConformalCoverage.update`. The target is used only to find missing values."""
        if isinstance(prediction, NumberPrediction):
            _, known = covered_targets(prediction, target, validate=self.validate_args)
            width = widen(prediction.conformal_upper) - widen(prediction.conformal_lower)
            self._add(width.clamp_min(0), known)
            return
        if not isinstance(prediction, ClassProbabilities | LabelProbabilities):
            raise InputError(
                f"`prediction` must be of classes, labels or numbers, but it is a {type(prediction).__name__}."
            )
        if isinstance(prediction, ClassProbabilities) and self.validate_args:
            covered_targets(prediction, target)  # raises an error if they do not fit
        self._add(prediction.set_size)


class FalseNegativeRate(MeanMetric):
    """Mean over inputs of the share of their true labels, or of their map's positions, that the prediction set misses.

    Inputs without a true label, or without a position that counts, are left out.

    Args:
        by_class: Whether each label, or class, of an input has a separate share.
        validate_args: As in all metrics; it has no effect here, because the values are not used.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import BernoulliPrediction
        >>> prediction = BernoulliPrediction(torch.zeros(1, 1, 3)).replace(prediction_set=torch.tensor([[True, False, True]]))
        >>> metric = FalseNegativeRate()
        >>> metric.update(prediction, torch.tensor([[1, 1, 0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, by_class: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("missed", validate_args=validate_args, **kwargs)
        self.by_class = by_class

    def update(self, prediction: Prediction, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: A prediction with sets [B, L], or [B, C, *P] of maps.
            target: Labels [B, L] that are 0, 1 or NaN (unknown), or classes [B, *P] with -1 at positions that do not count.

        Raises:
            NotFittedError: The prediction carries no sets.
        """
        if not isinstance(prediction, ClassProbabilities | LabelProbabilities):
            raise InputError(
                f"`prediction` must be of labels or maps of classes, but it is a {type(prediction).__name__}."
            )
        sets = prediction.prediction_set
        is_map = bool(prediction.map_shape)
        check_shape("target", target, torch.Size([*sets.shape[:1], *sets.shape[2:]]) if is_map else sets.shape)
        target = target.to(sets.device)
        if is_map:
            classes = torch.arange(sets.shape[1], device=sets.device).reshape(-1, *[1] * len(prediction.map_shape))
            relevant = target.unsqueeze(1) == classes
        else:
            relevant = target == 1
        axes = tuple(range(2 if self.by_class else 1, sets.ndim))
        missed = relevant & ~sets
        counts, misses = (mask.sum(axes) if axes else mask.long() for mask in (relevant, missed))
        self._add(widen(misses) / widen(counts).clamp_min(1), counts > 0)


def covered_targets(
    prediction: Prediction, target: Tensor, simultaneous: bool = False, *, validate: bool = True
) -> tuple[Tensor, Tensor]:
    """Whether targets lie in their set or interval, and whether they are known: bool [B], [B, D], or [B, ..., D] for a horizon.

    Args:
        prediction: A prediction with a set or an interval.
        target: Its targets.
        simultaneous: Whether all known steps of a horizon must be covered: bool [B, D].
        validate: Whether to check values as well as shapes.

    Raises:
        NotFittedError: The prediction carries neither.
        InputError: The prediction is neither of classes nor of numbers, or the target does not fit it.
    """
    if isinstance(prediction, ClassProbabilities):
        sets = prediction.prediction_set
        check_target(target, sets[:, 0].shape)
        if validate:
            check_target_values(target, sets.shape[1])
        covered = sets.gather(1, target.long().unsqueeze(1).to(sets.device)).squeeze(1)
        return covered, torch.ones_like(covered)
    if not isinstance(prediction, NumberPrediction):
        raise InputError(f"`prediction` must be of classes or of numbers, but it is a {type(prediction).__name__}.")
    lower, upper = prediction.conformal_lower, prediction.conformal_upper
    if validate:
        check_no_nan("conformal_lower", lower)
        check_no_nan("conformal_upper", upper)
    target = aligned_target(target, lower.shape).to(lower.device)
    covered, known = (lower <= target) & (target <= upper), ~target.isnan()
    if simultaneous and target.ndim > 2:
        axes = tuple(range(1, target.ndim - 1))
        covered, known = (covered | ~known).all(axes), known.any(axes)
    return covered, known
