"""Acquisition scores: the value of a label for each unlabelled input. Inputs with the highest scores are acquired first.

Each score takes logits [Z, B, C] and returns [B]; half precision is upcast to float32. :data:`ACQUISITION_SCORES` maps names to
functions, :func:`score` also takes predictions, and :func:`acquire` selects the inputs to label. Scores that also detect
out-of-distribution inputs have the names of :data:`~lightning_uq.functional.SCORES`: BALD (Houlsby et al.) is
``mutual_information``, and ENN's ``var_ratios`` is ``max_softmax``. Each score ranks inputs independently, so a group of near
duplicates is acquired together.

Source: ``enn.active_learning`` of google-deepmind/enn. Its entropies are NaN if a probability underflows to 0; these are
not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_uq.active_learning.selection import select
from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import log_softmax, mean_log_probs, mutual_information, predictive_entropy
from lightning_uq.functional.scores import max_softmax
from lightning_uq.functional.true_class import at_class
from lightning_uq.functional.validation import check_floating, check_integer, check_target, check_target_values
from lightning_uq.predictions import (
    BernoulliPrediction,
    CategoricalPrediction,
    ClassProbabilities,
    DirichletPrediction,
    Prediction,
    QuantilePrediction,
    StudentTPrediction,
)

ClassValues = Sequence[float] | Tensor


def uniform(logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A random number in [0, 1) for each input: the baseline for every other score.

    Args:
        logits: [Z, B, C], of which only B is used.
        generator: Source of the random numbers; default: torch's global generator.

    Example:
        >>> uniform(torch.zeros(1, 5, 2)).shape
        torch.Size([5])
    """
    _check(logits)
    device = None if generator is None else generator.device
    return torch.rand(logits.shape[1], generator=generator, device=device).to(logits.device)


def variance(logits: Tensor) -> Tensor:
    """Variance of the probabilities over the hypotheses, summed over classes: sum_c Var_z p_z(c), with Z as the denominator.

    Example:
        >>> variance(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]))
        tensor([0.5000])
    """
    _check(logits)
    return _variance(log_softmax(logits, 2).exp()).sum(1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels, -log mean_z p_z(y), in nats. It needs the labels that it would acquire.

    Example:
        >>> nll(torch.zeros(1, 1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    labels = _check_labels(logits, labels)
    return -at_class(mean_log_probs(logits), labels, 1)


def joint_nll(logits: Tensor, labels: Tensor, tau: int = 10) -> Tensor:
    """tau times the hypotheses' mean negative log-likelihood of the labels, -tau mean_z log p_z(y), in nats.

    This is ENN's definition of its joint score. It is a mean of logarithms, an upper bound of -log mean_z p_z(y)^tau for tau copies
    of an input with one label.

    Args:
        logits: [Z, B, C].
        labels: Class indices [B].
        tau: Number of copies of an input.

    Example:
        >>> joint_nll(torch.zeros(1, 1, 2), torch.tensor([1]))
        tensor([6.9315])
    """
    check_integer("tau", tau, 1)
    labels = _check_labels(logits, labels)
    return -tau * at_class(log_softmax(logits, 2), labels, 2).mean(0)


def margin(logits: Tensor) -> Tensor:
    """Minus the difference of the two largest mean probabilities.

    Source: Scheffer et al., IDA 2001.

    Example:
        >>> margin(torch.tensor([[[0.6, 0.3, 0.1]]]).log())
        tensor([-0.3000])
    """
    _check(logits)
    first, second = mean_log_probs(logits).topk(2, 1).values.exp().unbind(1)
    return second - first


def ucb(logits: Tensor, class_values: ClassValues | None = None, factor: float = 1.0) -> Tensor:
    """Upper confidence bound of an input's value: mean_z v_z + factor std_z v_z, where v_z = sum_c p_z(c) value_c.

    Args:
        logits: [Z, B, C].
        class_values: Value of an input of each class, [C]. None: 1 for class 0, and 0 for the others.
        factor: Number of standard deviations (with Z as the denominator).

    Raises:
        InputError: The values are not one finite number per class, or ``factor`` is not finite.

    Example:
        >>> ucb(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]))
        tensor([1.])
    """
    if not -torch.inf < factor < torch.inf:
        raise InputError(f"`factor` must be finite, but it is {factor}.")
    values = _values(logits, class_values)
    return values.mean(0) + factor * _variance(values).sqrt()


def scaled_mean(logits: Tensor, class_values: ClassValues | None = None) -> Tensor:
    """An input's mean value, mean_z sum_c p_z(c) value_c: the first part of :func:`ucb`.

    Example:
        >>> scaled_mean(torch.zeros(1, 1, 2), class_values=[1.0, 3.0])
        tensor([2.])
    """
    return _values(logits, class_values).mean(0)


def scaled_std(logits: Tensor, class_values: ClassValues | None = None) -> Tensor:
    """Standard deviation over the hypotheses of an input's value, std_z sum_c p_z(c) value_c: the second part of :func:`ucb`.

    Example:
        >>> scaled_std(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]))
        tensor([0.5000])
    """
    return _variance(_values(logits, class_values)).sqrt()


ACQUISITION_SCORES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "uniform": uniform,
        "variance": variance,
        "nll": nll,
        "joint_nll": joint_nll,
        "predictive_entropy": predictive_entropy,
        "margin": margin,
        "mutual_information": mutual_information,
        "max_softmax": max_softmax,
        "ucb": ucb,
        "scaled_mean": scaled_mean,
        "scaled_std": scaled_std,
    }
)

LABELLED = frozenset({"nll", "joint_nll"})
"""Scores that need the labels, for replaying a training or judging other scores."""

_POOLED = frozenset({"uniform", "nll", "predictive_entropy", "margin", "max_softmax", "scaled_mean"})


_PREDICTION_SCORES = frozenset(
    name
    for kind in (
        BernoulliPrediction,
        CategoricalPrediction,
        DirichletPrediction,
        QuantilePrediction,
        StudentTPrediction,
    )
    for name in kind.score_names
) | {"log_density", "ood_score"}


def score(name: str, outputs: Tensor | Prediction, labels: Tensor | None = None, **options: Any) -> Tensor:
    """A score by its name, of logits or of any prediction of this package.

    Scores of the mean prediction (``predictive_entropy``, ``margin``, ``max_softmax``, ``nll``, ``scaled_mean``) include its calibration, and
    ``mutual_information`` is the one of its hypotheses before a pooled one. The other scores of :data:`ACQUISITION_SCORES` need the members that
    ``return_members`` keeps. All other names are those of :meth:`Prediction.score`: ``epistemic_variance`` of a regressor,
    ``vacuity`` of a Dirichlet, or ``log_density``, by which low densities rank first.

    Args:
        name: A key of :data:`ACQUISITION_SCORES`, or a score of the prediction.
        outputs: Logits [Z, B, C], or a prediction.
        labels: Class indices [B], needed by the scores in :data:`LABELLED`, ignored by others.
        options: Further arguments of the score: ``class_values``, ``factor``, ``tau`` or ``generator``.

    Returns:
        [B]; the highest are acquired first. A prediction of maps has the mean over the positions of each input.

    Raises:
        InputError: The name is unknown, labels are missing, or the prediction lacks what the score needs.

    Example:
        >>> score("mutual_information", torch.tensor([[[50.0, 0.0], [1.0, 1.0]], [[0.0, 50.0], [1.0, 1.0]]]))
        tensor([0.6931, 0.0000])
    """
    check_score(name, options)
    if isinstance(outputs, Prediction) and (
        name not in ACQUISITION_SCORES or (not isinstance(outputs, ClassProbabilities) and name != "uniform")
    ):
        own = outputs.score(name)
        return own.reshape(len(own), -1).mean(1)
    if name == "uniform" and isinstance(outputs, Prediction):
        return uniform(torch.zeros(1, len(outputs), 2), **options)
    if not isinstance(outputs, Tensor) and outputs.map_shape and name not in LABELLED:
        rows = score(name, _class_probabilities(name, outputs).as_rows(), **options)
        return rows.reshape(len(outputs), -1).mean(1)
    if name in LABELLED:
        if labels is None:
            raise InputError(f"The score {name!r} needs `labels`, but they are None.")
        options["labels"] = labels
    if name == "mutual_information" and not isinstance(outputs, Tensor):
        return _class_probabilities(name, outputs).uncalibrated_mutual_information
    if name not in ACQUISITION_SCORES:
        raise InputError(f"The score {name!r} needs a prediction, but `outputs` holds logits.")
    logits = _logits(name, outputs)
    _check(logits)
    return ACQUISITION_SCORES[name](logits, **options)


def check_score(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown name, and options that the score does not take."""
    if name not in ACQUISITION_SCORES and name not in _PREDICTION_SCORES:
        names = (*ACQUISITION_SCORES, *sorted(_PREDICTION_SCORES - ACQUISITION_SCORES.keys()))
        raise InputError(f"`name` must be one of {', '.join(names)}, but it is {name!r}.")
    function = ACQUISITION_SCORES.get(name)
    parameters = () if function is None else inspect.signature(function).parameters
    known = [option for option in parameters if option not in ("logits", "labels")]
    if not options.keys() <= set(known):
        raise InputError(f"The options of {name!r} must be among {known}, but they are {sorted(options)}.")


def member_log_probs(prediction: Prediction) -> Tensor:
    """Log-probabilities of the members of a prediction of classes [Z, B, C].

    Raises:
        InputError: It is not a prediction of classes, or holds no members.
    """
    return log_softmax(_class_probabilities("of members", prediction).logits, 2)


def acquire(name: str, outputs: Tensor | Prediction, num: int, labels: Tensor | None = None, **options: Any) -> Tensor:
    """Positions [num] of the inputs to label next: :func:`select` applied to :func:`score`.

    Example:
        >>> acquire("predictive_entropy", torch.tensor([[[9.0, 0.0], [0.0, 0.0], [1.0, 0.0]]]), num=2)
        tensor([1, 2])
    """
    return select(score(name, outputs, labels, **options), num)


def _logits(name: str, outputs: Tensor | Prediction) -> Tensor:
    """The input of a score: logits, or log-probabilities of one pooled hypothesis."""
    if isinstance(outputs, Tensor):
        return outputs
    prediction = _class_probabilities(name, outputs)
    return prediction.log_probs.unsqueeze(0) if name in _POOLED else prediction.logits


def _class_probabilities(name: str, outputs: Prediction) -> ClassProbabilities:
    if isinstance(outputs, ClassProbabilities):
        return outputs
    raise InputError(
        f"The score {name!r} needs logits [Z, B, C] or a prediction of classes, but `outputs` is a {type(outputs).__name__}."
    )


def _values(logits: Tensor, class_values: ClassValues | None) -> Tensor:
    """The value [Z, B] of every input under every hypothesis."""
    _check(logits)
    probs = log_softmax(logits, 2).exp()
    if class_values is None:
        return probs[..., 0]
    values = torch.as_tensor(class_values, dtype=probs.dtype, device=probs.device)
    if values.shape != probs.shape[2:] or not bool(values.isfinite().all()):
        raise InputError(
            f"`class_values` must be {probs.shape[2]} finite numbers, one per class, but it is {values.tolist()}."
        )
    return probs @ values


def _variance(x: Tensor) -> Tensor:
    """Variance over axis 0 with its length as denominator; torch's own function warns if there is no input."""
    return (x - x.mean(0)).square().mean(0)


def _check(logits: Tensor) -> None:
    check_floating("logits", logits, 3, "[Z, B, C]")
    if logits.ndim != 3 or not len(logits) or logits.shape[2] < 2:
        raise InputError(
            f"`logits` must be [Z, B, C] with Z of at least 1 and C of at least 2, but its shape is {list(logits.shape)}."
        )
    # Minus infinity may exclude a class, but not all of them.
    bad = logits.isnan().any() | (logits.amax(2).isinf().any() if logits.numel() else False)
    if bool(bad):
        raise InputError("`logits` must be finite (or minus infinity for some classes), but it holds other values.")


def _check_labels(logits: Tensor, labels: Tensor) -> Tensor:
    _check(logits)
    check_target(labels, logits.shape[1:2])
    check_target_values(labels, logits.shape[2])
    return labels.long().to(logits.device)
