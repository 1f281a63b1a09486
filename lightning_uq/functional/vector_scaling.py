"""Vector scaling: a scale and a bias per class, held near a temperature by a ridge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration_rows import calibration_rows, warn_of_missing_classes
from lightning_uq.functional.precision import to_wide_device
from lightning_uq.functional.standard_error import standard_errors
from lightning_uq.functional.temperature import fit_temperature
from lightning_uq.functional.temperature_search import best_temperature
from lightning_uq.functional.validation import check_integer, flatten_classes

_STRENGTHS = tuple(10.0**exponent for exponent in (-4, -3, -2, -1, 0))
_ROWS_PER_CLASS = 20
_MAX_BYTES = 4 * 2**30
_PART_ELEMENTS = 2**17  # logits in float64 at a time


class VectorScalingFit(NamedTuple):
    """A fitted vector scaling.

    Attributes:
        scale: [C] in float64; all 1 / T where the temperature won.
        bias: [C] in float64; all 0 where the temperature won.
        temperature: T of all rows, a scalar in float64.
        strength: The ridge that validation chose; infinite where the temperature won.
    """

    scale: Tensor
    bias: Tensor
    temperature: Tensor
    strength: float


def apply_vector_scaling(logits: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale_c (l_c - mean_k l_k) + bias_c: logits [N, C, ...] -> [N, C, ...].

    Rows are centred first, so that, as for a softmax, only differences of logits matter. A class that a row rules out by minus
    infinity stays ruled out, and is left out of its mean.

    Example:
        >>> apply_vector_scaling(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.5]))
        tensor([[ 2.0000, -0.5000]])
    """
    shape = (-1, *[1] * (logits.ndim - 2))
    excluded = logits == -math.inf
    centered = logits.masked_fill(excluded, 0.0) - _class_mean(logits)
    return (scale.reshape(shape) * centered + bias.reshape(shape)).masked_fill(excluded, -math.inf)


def _class_mean(logits: Tensor) -> Tensor:
    """The mean [N, 1, ...] over the classes that a row of logits [N, C, ...] does not rule out."""
    excluded = logits == -math.inf
    return logits.masked_fill(excluded, 0.0).sum(1, keepdim=True) / (~excluded).sum(1, keepdim=True)


def _class_means(logits: Tensor) -> Tensor:
    """The same in float64, a few rows [N, C] at a time."""
    return torch.cat(
        [_class_mean(part.double()) for part in torch.split(logits, max(1, _PART_ELEMENTS // logits.shape[1]))]
    )


def fit_vector_scaling(
    logits: Tensor, target: Tensor, strengths: Sequence[float] = _STRENGTHS, num_folds: int = 5
) -> VectorScalingFit:
    """Fit a scale and a bias per class with a ridge towards the fitted temperature.

    With x = (l - mean l) / T the deviations a and bias b from the temperature minimise the convex

        mean_n -log softmax((1 + a) x_n + b)_y + strength / 2 (|a|^2 + |b|^2).

    The strength is the one of least negative log-likelihood on the held-out fifths of a five-fold split, T being fitted
    within each fold; where it does not beat T alone there by more than the standard error of the rows' differences, T it
    is. Without a ridge, vector scaling takes the likelihood of a few hundred rows of a hundred classes from good to useless.

    Args:
        logits: Logits or log-probabilities [N, C] (or [N, C, ...], each position a row) of held-out rows.
        target: Class indices [N] (or [N, ...]).
        strengths: Ridges to choose from, positive.
        num_folds: Number of folds, at least 2.

    Returns:
        The fit, for :func:`apply_vector_scaling`.

    Raises:
        InputError: As for :func:`~lightning_uq.functional.temperature.fit_temperature`; fewer rows than folds; a strength
            that is not positive; more than some ten thousand classes, whose Hessian [2 C, 2 C] would take over 4 GiB.

    Warns:
        UserWarning: There are fewer than 20 rows per class; a class has no row, and the temperature did not win; or the
            temperature has no finite optimum.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 4.2; the ridge after Kull et al., NeurIPS 2019 (arXiv
    1910.12656).

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
        >>> target = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 0, 1]).repeat(10)  # class 1 is over-predicted
        >>> fit = fit_vector_scaling(logits, target)
        >>> bool(fit.bias[0] > 0 > fit.bias[1])
        True
    """
    rows, classes = calibration_rows(logits, target, 2)
    N, C = rows.shape[1:]
    check_integer("num_folds", num_folds, 2)
    if (size := 8 * (2 * C) ** 2) > _MAX_BYTES:
        raise InputError(
            f"`logits` must have so few classes that second derivatives of {_MAX_BYTES / 2**30:.3g} GiB do, but "
            f"those of {C} classes take {size / 2**30:.3g} GiB. Fit a temperature."
        )
    if num_folds > N:
        raise InputError(f"`logits` must hold at least {num_folds} rows, one per fold, but it holds {N}.")
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise InputError(f"`strengths` must hold positive numbers, but it holds {list(strengths)!r}.")
    if _ROWS_PER_CLASS * C > N:
        warnings.warn(
            f"Vector scaling was fitted to {N} rows of {C} classes, fewer than {_ROWS_PER_CLASS} per class; a "
            "temperature alone is safer.",
            stacklevel=2,
        )
    T = fit_temperature(logits, target).to(rows.device)
    data = _Rows(rows[0], _class_means(flatten_classes(to_wide_device(logits))), classes)

    # Shuffled, since rows may lie in the order of their classes; by a fixed seed, so that two fits are equal.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(rows.device)
    # Of each row while held out: under T, then under each strength.
    losses = rows.new_empty(1 + len(strengths), N, dtype=torch.float64)
    for held in torch.tensor_split(order, num_folds):
        kept = data.take(torch.ones_like(order, dtype=torch.bool).index_fill(0, held, False))
        held_out = data.take(held)
        fold = best_temperature(kept.logits[None], kept.target).temperature
        start = rows.new_zeros(2, C, dtype=torch.float64)
        losses[0, held] = held_out.losses(fold, start)
        for i, strength in sorted(
            enumerate(strengths, 1), key=lambda pair: -pair[1]
        ):  # each starts at a stronger one's
            start = _minimise(kept, fold, strength, start)
            losses[i, held] = held_out.losses(fold, start)
    best = int(losses[1:].mean(1).argmin())
    gain = losses[0] - losses[1 + best]
    start = torch.zeros_like(start)
    if not gain.mean() > standard_errors(gain):
        return VectorScalingFit((1 / T).expand(C).clone(), start[1], T, math.inf)
    warn_of_missing_classes(rows[0], classes)
    a, b = _minimise(data, float(T), strengths[best], start)
    return VectorScalingFit((1 + a) / T, b, T, float(strengths[best]))


class _Rows(NamedTuple):
    """Rows that are widened, and centred, a few at a time.

    Attributes:
        logits: [N, C] in their own precision.
        mean: Their means over classes [N, 1] in float64.
        target: [N].
    """

    logits: Tensor
    mean: Tensor
    target: Tensor

    def take(self, index: Tensor) -> _Rows:
        """The rows at an index or a mask."""
        return _Rows(*(part[index] for part in self))

    def parts(self, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred logits over the temperature, [n, C] in float64, and targets [n] of some rows at a time."""
        size = max(1, _PART_ELEMENTS // self.logits.shape[1])
        for logits, mean, target in zip(*(torch.split(part, size) for part in self), strict=True):
            yield (logits - mean) / temperature, target  # the mean's float64 widens

    def losses(self, temperature: float, parameters: Tensor) -> Tensor:
        """The negative log-likelihood [N] of each row under a and b, [2, C]."""
        return torch.cat([_nll(x, target, parameters) for x, target in self.parts(temperature)])


def _nll(x: Tensor, target: Tensor, parameters: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((1 + parameters[0]) * x + parameters[1], target, reduction="none")


def _minimise(data: _Rows, temperature: float, strength: float, start: Tensor) -> Tensor:
    """The minimum [2, C] of the ridged, strictly convex loss, by Newton's method with backtracking."""
    N, C = data.logits.shape
    a_part, b_part = slice(0, C), slice(C, 2 * C)
    parameters = start.clone()

    def loss(at: Tensor) -> float:
        total = sum(float(_nll(x, target, at).sum()) for x, target in data.parts(temperature))
        return total / N + float(strength / 2 * at.square().sum())

    value = loss(parameters)
    for _ in range(100):
        gradient = strength * parameters.flatten()
        hessian = start.new_zeros(2 * C, 2 * C)
        for x, target in data.parts(temperature):
            probs = torch.softmax((1 + parameters[0]) * x + parameters[1], 1)
            # With w = (x p, p) the Hessian is the mean of [diag(x^2 p), diag(x p); diag(x p), diag(p)] - w w^T.
            moments = torch.cat([x * probs, probs], 1) / N
            hessian.addmm_(moments.T, moments, alpha=-N)
            of_x, of_one = torch.split(moments.sum(0), C)
            for block, diagonal in (
                (hessian[a_part, a_part], (x * moments[:, a_part]).sum(0)),
                (hessian[a_part, b_part], of_x),
                (hessian[b_part, a_part], of_x),
                (hessian[b_part, b_part], of_one),
            ):
                block.diagonal().add_(diagonal)
            error = probs.scatter_add_(1, target[:, None], -probs.new_ones(len(x), 1)) / N
            gradient += torch.cat([(error * x).sum(0), error.sum(0)])
        hessian.diagonal().add_(strength)
        step = torch.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-14:
            break
        size, following = 1.0, parameters - step.reshape(2, C)
        while (proposed := loss(following)) > value - size / 4 * decrement and size > 1e-6:
            size /= 2
            following = parameters - size * step.reshape(2, C)
        if not proposed < value:  # what is left to gain is rounding
            break
        parameters, value = following, proposed
    return parameters
