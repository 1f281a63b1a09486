"""Proper scores and entropies, averaged over a data set."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import scoring
from lightning_uq.functional.entropy import entropy, mutual_information
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.true_class import at_class
from lightning_uq.functional.validation import (
    check_bool,
    check_floating,
    check_no_nan,
    check_probs_values,
    check_shape,
    check_target,
    check_target_values,
    flatten_classes,
)
from lightning_uq.metrics.base import HasProbs, MeanMetric, get_probs, logits_to_log_probs, prediction_rows


class NegativeLogLikelihood(MeanMetric):
    """Mean -log p of the true class, in nats; a proper score.

    A prediction object is scored by its own ``log_prob``, in log space. Probabilities are scored by their logarithm, so the value is
    infinite if the true class has a probability of exactly 0.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    takes_soft_targets = True

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("negative_log_likelihood", validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities [B, C, ...] (logits with ``from_logits``), or a prediction object.
            target: Class indices [B, ...], or probabilities [B, C, ...], which are scored by the mean of -sum_c t_c log p_c.

        Raises:
            InputError: The values are not probabilities or indices, or shapes differ.
        """
        if is_soft(prediction, target):
            log_probs, soft = soft_rows(prediction, target, self.from_logits, self.validate_args)
            self._add(-torch.where(soft > 0, soft * log_probs, 0.0).sum(1))
            return
        if isinstance(prediction, Tensor) and not self.from_logits:
            self._add(scoring.negative_log_likelihood(*prediction_rows(prediction, target, False, self.validate_args)))
            return
        if isinstance(prediction, Tensor):
            log_probs = logits_to_log_probs(prediction, self.validate_args)
        else:
            log_probs = log_probs_of(prediction)
        check_target(target, log_probs.shape[:1] + log_probs.shape[2:])
        if self.validate_args:
            check_target_values(target, log_probs.shape[1])
            check_no_nan("prediction", log_probs)
        self._add(-at_class(log_probs, target, 1))


def is_soft(prediction: Tensor | HasProbs, target: Tensor) -> bool:
    """Whether the targets are probabilities, with a class axis like the prediction's."""
    if not target.is_floating_point():
        return False
    return target.ndim == (prediction if isinstance(prediction, Tensor) else log_probs_of(prediction)).ndim


def soft_rows(
    prediction: Tensor | HasProbs, target: Tensor, from_logits: bool, validate: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, C] of a prediction, and its target probabilities [N, C].

    Raises:
        InputError: The values are not probabilities, or shapes differ.
    """
    if not isinstance(prediction, Tensor):
        log_probs = log_probs_of(prediction)
    elif from_logits:
        log_probs = logits_to_log_probs(prediction, validate)
    else:
        check_floating("prediction", prediction, 2, "[B, C, ...]")
        log_probs = upcast(prediction).log()
    check_shape("target", target, log_probs.shape)
    log_probs, target = flatten_classes(log_probs), flatten_classes(target)
    if validate:
        check_probs_values(log_probs.exp(), "prediction")
        check_probs_values(target, "target")
    return log_probs, target.to(log_probs.dtype)


def log_probs_of(prediction: HasProbs) -> Tensor:
    """Pooled log-probabilities [B, C, ...] of a prediction object, without leaving log space if the object stores them."""
    log_probs = getattr(prediction, "log_probs", None)
    return log_probs if isinstance(log_probs, Tensor) else upcast(get_probs(prediction)).log()


class Accuracy(MeanMetric):
    """Share of rows whose most probable class is the true one.

    It equals torchmetrics' micro accuracy, but needs no number of classes. Rows of maps count individually.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("correct", **kwargs)

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities or logits [B, C, ...], or a prediction object.
            target: Class indices [B, ...].

        Raises:
            InputError: The values are not class indices, or shapes differ.
        """
        if isinstance(prediction, Tensor):
            check_floating("prediction", prediction, 2, "[B, C, ...]")
            scores = prediction
        else:
            scores = log_probs_of(prediction)
        check_target(target, scores.shape[:1] + scores.shape[2:])
        if self.validate_args:
            check_target_values(target, scores.shape[1])
            check_no_nan("prediction", scores)
        self._add(scores.argmax(1) == target)


class BrierScore(MeanMetric):
    """Mean squared distance between probabilities and the one-hot target, summed over classes: in [0, 2]; a proper score.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 2.0
    takes_soft_targets = True

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("brier_score", validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits

    def update(self, prediction: Tensor | HasProbs, target: Tensor) -> None:
        """Add a batch; see :meth:`NegativeLogLikelihood.update`. Target probabilities are scored by sum_c (p_c - t_c)^2."""
        if is_soft(prediction, target):
            log_probs, soft = soft_rows(prediction, target, self.from_logits, self.validate_args)
            self._add((log_probs.exp() - soft).square().sum(1))
            return
        self._add(scoring.brier_score(*prediction_rows(prediction, target, self.from_logits, self.validate_args)))


class PredictiveEntropy(MeanMetric):
    """Mean entropy of the pooled prediction, in nats.

    Args:
        from_logits: Whether ``update`` takes logits instead of probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = PredictiveEntropy()
        >>> metric.update(torch.tensor([[0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    plot_lower_bound: float | None = 0.0

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("predictive_entropy", validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits

    def update(self, prediction: Tensor | HasProbs, target: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            prediction: Probabilities [B, C, ...] (logits with ``from_logits``), or a prediction object.
            target: Ignored; allows the metric in a ``MetricCollection``.

        Raises:
            InputError: The values are not probabilities.
        """
        values = self._values(prediction)
        if self.validate_args:
            check_no_nan("prediction", values)
        self._add(values)

    def _values(self, prediction: Tensor | HasProbs) -> Tensor:
        if not isinstance(prediction, Tensor):
            return entropy(log_probs_of(prediction), 1)
        if self.from_logits:
            return entropy(logits_to_log_probs(prediction, self.validate_args), 1)
        check_floating("probs", prediction, 2, "[B, C, ...]")
        if self.validate_args:
            check_probs_values(flatten_classes(prediction))
        return torch.sum(torch.special.entr(upcast(prediction)), 1)


class MutualInformation(MeanMetric):
    """Mean mutual information between label and index, in nats: the members' disagreement; 0 for a single member.

    Args:
        from_logits: Whether ``update`` takes member logits instead of member probabilities.
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Source: Houlsby et al. (arXiv 1112.5745).

    Example:
        >>> metric = MutualInformation()
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))  # two members, sure of the opposite
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    plot_lower_bound: float | None = 0.0

    def __init__(self, from_logits: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__("mutual_information", validate_args=validate_args, **kwargs)
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits

    def update(self, prediction: Tensor | HasProbs, target: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            prediction: Member probabilities [Z, B, C, ...] (member logits with ``from_logits``), or a prediction object
                that has ``mutual_information`` (a pooled calibration does not change it) or member ``logits``.
            target: Ignored; allows the metric in a ``MetricCollection``.

        Raises:
            InputError: The values are not probabilities, or the object has no members.
        """
        values = self._values(prediction)
        if self.validate_args:
            check_no_nan("prediction", values)
        self._add(values)

    def _values(self, prediction: Tensor | HasProbs) -> Tensor:
        if isinstance(prediction, Tensor):
            name = "logits" if self.from_logits else "probs"
            check_floating(name, prediction, 3, "[Z, B, C, ...]")
            if self.from_logits:
                return mutual_information(prediction)
            if self.validate_args:
                check_probs_values(flatten_classes(prediction.flatten(0, 1)))
            return mutual_information(upcast(prediction).log())
        for name in ("uncalibrated_mutual_information", "mutual_information"):
            values = getattr(prediction, name, None)
            if isinstance(values, Tensor):
                return values
        logits = getattr(prediction, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim < 3:
            raise InputError(
                "`prediction` must be a tensor [Z, B, C] or a prediction with `mutual_information` or "
                f"member `logits` [Z, B, C], but it is a {type(prediction).__name__}."
            )
        return mutual_information(logits)
