"""Vector scaling: a scale and a bias per class, with a ridge towards a temperature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration_rows import calibration_rows, warn_of_missing_classes
from lightning_uq.functional.precision import to_wide_device
from lightning_uq.functional.standard_error import standard_errors
from lightning_uq.functional.temperature import fit_temperature
from lightning_uq.functional.validation import check_integer, flatten_classes

_STRENGTHS = tuple(10.0**exponent for exponent in (-4, -3, -2, -1, 0))
_ROWS_PER_CLASS = 20
_MAX_BYTES = 4 * 2**30
_PART_ELEMENTS = 2**17  # logits at a time, to fit in a cache
_NEAR, _EXACT = 1e-10, 1e-14  # decrements of Newton's method; a minimum counts as found at the second
_SHARE_OF_NOISE = 1e-3  # of the gain from fitting as many parameters to noise: accurate enough to compare strengths
_SLOW = 0.2  # if a step leaves more than this share of its decrement, the Hessian is recomputed


class VectorScalingFit(NamedTuple):
    """A fitted vector scaling.

    Attributes:
        scale: [C] in float64; all 1 / T if the temperature was chosen.
        bias: [C] in float64; all 0 if the temperature was chosen.
        temperature: T of all rows, a scalar in float64.
        strength: The ridge that validation chose; infinite if the temperature was chosen.
    """

    scale: Tensor
    bias: Tensor
    temperature: Tensor
    strength: float


def apply_vector_scaling(logits: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale_c (l_c - mean_k l_k) + bias_c: logits [N, C, ...] -> [N, C, ...].

    Rows are centred first, so that only differences of logits matter, as for a softmax. A class that a row excludes by minus infinity
    stays excluded, and is left out of the row's mean.

    Example:
        >>> apply_vector_scaling(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.5]))
        tensor([[ 2.0000, -0.5000]])
    """
    shape = (-1, *[1] * (logits.ndim - 2))
    excluded = logits == -math.inf
    centered = logits.masked_fill(excluded, 0.0) - _class_mean(logits)
    return (scale.reshape(shape) * centered + bias.reshape(shape)).masked_fill(excluded, -math.inf)


def _class_mean(logits: Tensor) -> Tensor:
    """The mean [N, 1, ...] of logits [N, C, ...] over the classes that a row does not exclude."""
    excluded = logits == -math.inf
    return logits.masked_fill(excluded, 0.0).sum(1, keepdim=True) / (~excluded).sum(1, keepdim=True)


def _class_means(logits: Tensor) -> Tensor:
    """:func:`_class_mean` in float64, a few rows [N, C] at a time."""
    mean = _class_mean if logits.amin() == -math.inf else partial(torch.mean, dim=1, keepdim=True)
    return torch.cat([mean(part.double()) for part in torch.split(logits, max(1, _PART_ELEMENTS // logits.shape[1]))])


def fit_vector_scaling(
    logits: Tensor, target: Tensor, strengths: Sequence[float] = _STRENGTHS, num_folds: int = 5
) -> VectorScalingFit:
    """Fit a scale and a bias per class with a ridge towards the fitted temperature.

    With x = (l - mean l) / T, the deviations a and bias b from the temperature minimise the convex function

        mean_n -log softmax((1 + a) x_n + b)_y + strength / 2 (|a|^2 + |b|^2).

    The strength minimises the negative log-likelihood on the held-out fifths of a five-fold split, around the T of all rows. If it does not
    beat T alone there by more than the standard error of the rows' differences, T is used. Without a ridge, vector scaling can make good
    likelihoods useless with a few hundred rows of a hundred classes.

    Args:
        logits: Logits or log-probabilities [N, C] of held-out rows, or [N, C, ...] with each position as a row.
        target: Class indices [N] (or [N, ...]).
        strengths: Ridges to choose from, positive.
        num_folds: Number of folds, at least 2.

    Returns:
        The fit, for :func:`apply_vector_scaling`.

    Raises:
        InputError: See :func:`~lightning_uq.functional.temperature.fit_temperature`. Also: there are fewer rows than folds, a
            strength is not positive, or there are more than about ten thousand classes, whose Hessian [2 C, 2 C] would take over 4 GiB.

    Warns:
        UserWarning: There are fewer than 20 rows per class; a class has no row, and the temperature was not chosen; or the
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
            f"`logits` have {C} classes, whose second derivatives take {size / 2**30:.3g} GiB, but the limit is "
            f"{_MAX_BYTES / 2**30:.3g} GiB. Fit a temperature."
        )
    if num_folds > N:
        raise InputError(f"`logits` must hold at least {num_folds} rows, one per fold, but it holds {N}.")
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise InputError(f"`strengths` must hold positive numbers, but it holds {list(strengths)!r}.")
    if _ROWS_PER_CLASS * C > N:
        warnings.warn(
            f"Vector scaling was fitted to {N} rows of {C} classes, fewer than {_ROWS_PER_CLASS} per class. A "
            "temperature is safer.",
            stacklevel=2,
        )
    T = fit_temperature(logits, target).to(rows.device)
    # Shuffled, because rows may be sorted by class; with a fixed seed, so that two fits agree.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(rows.device)
    data = _Rows.of(rows[0], _class_means(flatten_classes(to_wide_device(logits))), classes, T, order)
    ends = [N * fold // num_folds for fold in range(num_folds + 1)]
    hessian: Tensor | None = None
    start = rows.new_zeros(2, C, dtype=torch.float64)
    tempered = data.losses(start)
    losses, starts = {}, {}  # by strength: each row's loss while held out, and the last minimum
    for strength in sorted(
        strengths, reverse=True
    ):  # each search starts at the minimum for a stronger ridge, and each fold at that of the fold before
        found = []
        for low, high in pairwise(ends):
            rest, tolerance = data.without(low, high), _SHARE_OF_NOISE * 2 * C / N
            start, hessian = _minimise(rest, strength, start, hessian, tolerance)
            found.append(data.part(low, high).losses(start))
        losses[strength], starts[strength] = torch.cat(found), start
    best = min(losses, key=lambda strength: float(losses[strength].mean()))
    gain = tempered - losses[best]
    if not gain.mean() > standard_errors(gain):
        return VectorScalingFit((1 / T).expand(C).clone(), torch.zeros_like(start[1]), T, math.inf)
    warn_of_missing_classes(rows[0], classes)
    near, hessian = _minimise(data, best, starts[best], hessian, _NEAR)
    (a, b), _ = _minimise(data.widened(), best, near, hessian)
    return VectorScalingFit((1 + a) / T, b, T, float(best))


@dataclass(frozen=True)
class _Rows:
    """Rows as columns, in the precision of the logits, because sums over few classes are fast along the first axis.

    Args:
        pieces: Centred logits divided by the temperature, [C, n] each.
        own: The same for the true class [N], in float64.
        target: Class indices [N].
        dtype: The precision of computations per row; sums over rows are float64.
    """

    pieces: Sequence[Tensor]
    own: Tensor
    target: Tensor
    dtype: torch.dtype

    @cached_property
    def sums(self) -> Tensor:
        """Sums [2, C] over each class's rows of the factors by which its scale and its bias enter the target's logit."""
        terms = torch.stack([self.own, torch.ones_like(self.own)])
        return self.own.new_zeros(2, len(self.pieces[0])).index_add_(1, self.target, terms)

    @classmethod
    def of(cls, logits: Tensor, mean: Tensor, target: Tensor, temperature: Tensor, order: Tensor) -> _Rows:
        """Rows of logits [N, C], with their means [N, 1] over classes in float64, in a given order."""
        x, target = logits.new_empty(logits.shape[1], len(order)), target[order]
        size = max(1, _PART_ELEMENTS // len(x))
        for part, rows in zip(torch.split(x, size, 1), torch.split(order, size), strict=True):
            part.copy_(((logits[rows] - mean[rows]) / temperature).T)  # the float64 mean widens the logits
        return cls([x], x.gather(0, target[None])[0].double(), target, x.dtype)

    def part(self, low: int, high: int) -> _Rows:
        """A range of rows."""
        return _Rows([self.pieces[0][:, low:high]], self.own[low:high], self.target[low:high], self.dtype)

    def without(self, low: int, high: int) -> _Rows:
        """All rows except a range."""
        x = self.pieces[0]
        own, target = (torch.cat([values[:low], values[high:]]) for values in (self.own, self.target))
        return _Rows([x[:, :low], x[:, high:]], own, target, self.dtype)

    def widened(self) -> _Rows:
        """The same rows, with computations in float64."""
        return _Rows(self.pieces, self.own, self.target, torch.float64)

    def losses(self, at: Tensor) -> Tensor:
        """The negative log-likelihood [N] of each row for a and b, [2, C], in float64."""
        a, b = at
        total = torch.cat([torch.logsumexp(z, 0).double() for _, z in self._scaled(at)])
        own: Tensor = (1 + a[self.target]) * self.own + b[self.target]
        return total - own

    def _scaled(self, at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the columns [C, n], and their logits for a and b, in order."""
        a, b = at.to(self.dtype).unsqueeze(2)
        size = max(1, _PART_ELEMENTS // len(a))
        for piece in self.pieces:
            for x in torch.split(piece, size, 1):
                x = x.to(self.dtype)
                yield x, torch.mul(x, 1 + a).add_(b)  # addcmul takes twice as long

    def loss(self, at: Tensor, strength: float) -> tuple[float, Tensor]:
        """The ridged mean loss and its gradient [2, C], in one pass."""
        value, gradient = at.new_zeros(()), torch.zeros_like(at)
        for x, z in self._scaled(at):
            top = z.amax(0)
            probs = z.sub_(top).exp_()
            norm = probs.sum(0)
            value += (top + norm.log()).sum(dtype=torch.float64)
            probs /= norm
            gradient[1] += probs.sum(1)
            gradient[0] += probs.mul_(x).sum(1)
        scaling = torch.stack([1 + at[0], at[1]])
        N = len(self.target)
        ridge = strength / 2 * at.square().sum()
        return float((value - (scaling * self.sums).sum()) / N + ridge), (gradient - self.sums) / N + strength * at

    def hessian(self, at: Tensor) -> Tensor:
        """The Hessian [2 C, 2 C] of the mean loss without the ridge."""
        C, N = at.shape[1], len(self.target)
        hessian = at.new_zeros(2 * C, 2 * C)
        blocks = hessian.view(2, C, 2, C).diagonal(dim1=1, dim2=3)  # [2, 2, C]
        for x, z in self.widened()._scaled(at):  # a rounded product need not be positive definite
            probs = torch.softmax(z, 0)
            # With w = (x p, p) the Hessian is the mean of [diag(x^2 p), diag(x p); diag(x p), diag(p)] - w w^T.
            moments = torch.cat([x * probs, probs])
            hessian -= moments @ moments.T
            of_x, of_one = moments.sum(1).reshape(2, C)
            blocks += torch.stack([torch.stack([(x * moments[:C]).sum(1), of_x]), torch.stack([of_x, of_one])])
        return hessian / N


def _minimise(
    data: _Rows, strength: float, start: Tensor, hessian: Tensor | None, tolerance: float = _EXACT
) -> tuple[Tensor, Tensor]:
    """The minimum [2, C] of a ridged, strictly convex loss by Newton's method with backtracking, and the Hessian used last.

    The Hessian costs as much as many losses. It is reused between steps and searches until a step gains too little.

    Args:
        data: The rows.
        strength: Strength of the ridge.
        start: Where to start [2, C].
        hessian: The Hessian of an earlier search, without the ridge. None: computed at the start.
        tolerance: The decrement to reach, which is twice the remaining gain in the loss.
    """
    at, is_new = start, hessian is None
    hessian = data.hessian(at) if hessian is None else hessian
    factor = _factor(hessian, strength)
    value, gradient = data.loss(at, strength)
    step, decrement = _newton_step(factor, gradient)
    rounding = torch.finfo(data.dtype).eps * max(1.0, abs(value))
    for _ in range(100):
        if decrement < tolerance:
            break
        size, (following, gradient) = 1.0, data.loss(at - step, strength)
        while following > value - size / 4 * decrement + rounding and size > 1e-6:
            size /= 2
            following, gradient = data.loss(at - size * step, strength)
        at, value, previous = at - size * step, following, decrement
        step, decrement = _newton_step(factor, gradient)
        if decrement < _SLOW * previous:
            is_new = False
        elif is_new and decrement < rounding:  # only rounding is left
            break
        else:
            hessian, is_new = data.hessian(at), True
            factor = _factor(hessian, strength)
            step, decrement = _newton_step(factor, gradient)
    return at, hessian


def _factor(hessian: Tensor, strength: float) -> Tensor:
    """The Cholesky factor of the Hessian with the ridge."""
    ridged = hessian.clone()
    ridged.diagonal().add_(strength)
    factor: Tensor = torch.linalg.cholesky(ridged)
    return factor


def _newton_step(factor: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
    """The step [2, C] that is subtracted to approach a minimum, and its product with the gradient."""
    step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).reshape(gradient.shape)
    return step, float((gradient * step).sum())
