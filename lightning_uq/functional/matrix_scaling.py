"""Matrix scaling: an affine map of log-probabilities with a ridge on its deviations from a temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lightning_uq.errors import InputError
from lightning_uq.functional.calibration_rows import calibration_rows, warn_of_missing_classes
from lightning_uq.functional.standard_error import standard_errors
from lightning_uq.functional.temperature import fit_temperature
from lightning_uq.functional.true_class import at_class
from lightning_uq.functional.validation import check_integer

_STRENGTHS = (10.0, 1.0, 0.1)
_MAX_BYTES = 4 * 2**30
_WEIGHTS_PER_ROW = 10  # above it, the weights between classes, C (C - 1), are left out
_NO_FLOOR = -1e4  # far below any log-probability, but finite, as stored tensors must be
_MARGIN = 0.75  # standard errors; chosen on classifiers of KITTI, MNIST and PCam
_PART_ELEMENTS = 2**16  # fits in a cache
_EXACT = 1e-7  # slope at which a minimum counts as found
_SHARE_OF_NOISE = 1e-3  # of the squared slopes from the rows' noise: accurate enough to compare strengths
_FOLD_ELEMENTS = 2**22  # above it, only one fold is held out, instead of each in turn


class MatrixScalingFit(NamedTuple):
    """A fitted matrix scaling.

    Attributes:
        weight: [C, C] in float64; the identity if the temperature was chosen.
        bias: [C] in float64; all 0 if the temperature was chosen.
        floor: Log-probability below which the features level off, a scalar in float64; -10,000 if the temperature was chosen.
        temperature: T of all rows, a scalar in float64.
        strength: The strength that validation chose; infinite if the temperature was chosen.
    """

    weight: Tensor
    bias: Tensor
    floor: Tensor
    temperature: Tensor
    strength: float

    @property
    def class_matrix(self) -> Tensor:
        """All parameters as one tensor [C + 3, C]: the rows of the weight, the bias, and for each class the floor and 1 / T."""
        rows = (self.bias, self.floor.expand_as(self.bias), (1 / self.temperature).expand_as(self.bias))
        return torch.cat([self.weight, torch.stack(rows)])


def apply_matrix_scaling(log_probs: Tensor, class_matrix: Tensor) -> Tensor:
    """log softmax(W x + b), with x = log(softmax(l / T) + exp floor): log-probabilities [N, C, ...] -> [N, C, ...].

    A class that a row excludes by minus infinity stays excluded. NaN stays NaN.

    Args:
        log_probs: Logits or log-probabilities [N, C, ...].
        class_matrix: W, b, floor and 1 / T, see :attr:`MatrixScalingFit.class_matrix`.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [-99.0, -99.0], [1.0, 1.0]])
        >>> apply_matrix_scaling(torch.tensor([[0.7, 0.3]]).log(), swap).exp()
        tensor([[0.3000, 0.7000]])
    """
    C = class_matrix.shape[1]
    weight, (bias, floor, inverse) = class_matrix[:C], class_matrix[C:].unsqueeze(1)
    excluded = log_probs == -math.inf
    x = _features(log_probs.movedim(1, -1) * inverse, floor)
    device = x.device.type
    if torch.is_autocast_enabled(device):  # autocast would round the product to half precision
        with torch.autocast(device, enabled=False):
            scaled = linear(x, weight, bias.squeeze(0))
    else:
        scaled = linear(x, weight, bias.squeeze(0))
    return torch.log_softmax(scaled.movedim(-1, 1).masked_fill(excluded, -math.inf), 1)


def _features(tempered: Tensor, floor: Tensor) -> Tensor:
    """log(softmax(l / T) + exp floor) for tempered logits [..., C]."""
    log_probs = torch.log_softmax(tempered, -1)
    log_probs = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
    # Not torch.logaddexp, which ONNX computes as log(exp + exp): minus infinity if both underflow.
    return torch.maximum(log_probs, floor) + (-(log_probs - floor).abs()).exp().log1p()


def fit_matrix_scaling(
    logits: Tensor, target: Tensor, strengths: Sequence[float] = _STRENGTHS, num_folds: int = 5
) -> MatrixScalingFit:
    """Fit an affine map of log-probabilities with a ridge towards the fitted temperature.

    With x = log(softmax(l / T) + e), where e = 1 / (C (N + 1)) as from one more, uniform row, the deviations A [C, C] and bias b from
    the temperature minimise the convex function

        mean_n -log softmax(x_n + A x_n + b)_y + strength (C / N) (|diag A|^2 + |b|^2) + strength (C (C - 1) / N) |offdiag A|^2.

    With more rows per weight, the ridge is weaker, and a strength of 1 suits most classifiers. Another of the ``strengths``, or the
    temperature alone, is chosen if its likelihood on the held-out fifths of a five-fold split is better by more than 0.75 standard
    errors of the rows' differences. With more than ten weights between classes per row (for example 1,000 classes and fewer than
    100,000 rows), A is diagonal. For more than four million logits, the strength is chosen on one fold.

    Args:
        logits: Logits or log-probabilities [N, C] of held-out rows, or [N, C, ...] with each position as a row.
        target: Class indices [N] (or [N, ...]).
        strengths: Strengths to choose from, positive; the one nearest to 1 on a log scale is the default.
        num_folds: Number of folds, at least 2.

    Returns:
        The fit; pass :attr:`MatrixScalingFit.class_matrix` to :func:`apply_matrix_scaling`.

    Raises:
        InputError: See :func:`~lightning_uq.functional.temperature.fit_temperature`. Also: there are fewer rows than folds, a
            strength is not positive, or there are more than about twenty thousand classes, whose matrix would take over 4 GiB.

    Warns:
        UserWarning: The temperature has no finite optimum; or a class has no row, and the temperature was not chosen.

    Source: Berta, Holzmüller, Jordan & Bach, "Structured matrix scaling for multi-class calibration" (arXiv 2511.03685), for the
    penalties and their scaling with N and C. The choice of the strength is this package's own.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).repeat(100, 1)
        >>> target = torch.tensor([0, 1, 2, 0, 2, 2]).repeat(50)  # half of class 1 is class 2
        >>> fit = fit_matrix_scaling(logits, target)
        >>> apply_matrix_scaling(logits[:3], fit.class_matrix).exp().round(decimals=1)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    rows, classes = calibration_rows(logits, target, 2)
    rows = rows.double()
    N, C = rows.shape[1:]
    check_integer("num_folds", num_folds, 2)
    if (size := 8 * C * (C + 3)) > _MAX_BYTES:
        raise InputError(
            f"`logits` have {C} classes, whose matrix takes {size / 2**30:.3g} GiB, but the limit is {_MAX_BYTES / 2**30:.3g} GiB. "
            "Fit a temperature."
        )
    if num_folds > N:
        raise InputError(f"`logits` must hold at least {num_folds} rows, one per fold, but it holds {N}.")
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise InputError(f"`strengths` must hold positive numbers, but it holds {list(strengths)!r}.")
    T = fit_temperature(logits, target).to(rows.device)
    floor = rows.new_tensor(-math.log(C * (N + 1)))
    num_columns = C + 1 if C * (C - 1) <= _WEIGHTS_PER_ROW * N else 2
    # Shuffled, because rows may be sorted by class; with a fixed seed, so that two fits agree.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(rows.device)
    tempered, shuffled = rows[0][order] / T, classes[order]
    data = _Columns([_features(tempered, floor).T.contiguous()], shuffled, num_columns)

    path = sorted(strengths, reverse=True)  # each search starts at the solution for the next stronger ridge
    losses: dict[float, Tensor] = {}
    start = rows.new_zeros(C, num_columns)
    ends = [N * fold // num_folds for fold in range(num_folds + 1)]
    folds = list(pairwise(ends))[: num_folds if C * N <= _FOLD_ELEMENTS else 1]
    num_held = folds[-1][1]
    for strength in path:
        found, coordinates = [], _Coordinates.at(data, start)
        for low, high in folds:
            start = _minimise(data.without(low, high), coordinates, strength, start, math.sqrt(_SHARE_OF_NOISE / N))
            found.append(data.part(low, high).losses(start))
        losses[strength] = torch.cat(found)
    losses[math.inf] = cross_entropy(tempered[:num_held], shuffled[:num_held], reduction="none")
    default = min(path, key=lambda strength: abs(math.log(strength)))
    best = min(losses, key=lambda strength: float(losses[strength].mean()))
    gain = losses[default] - losses[best]
    chosen = best if gain.mean() > _MARGIN * standard_errors(gain) else default
    identity = torch.eye(C).to(rows)
    if chosen == math.inf:
        return MatrixScalingFit(identity, rows.new_zeros(C), rows.new_tensor(_NO_FLOOR), T, math.inf)
    warn_of_missing_classes(rows[0], classes)
    theta = _minimise(data, _Coordinates.at(data, start), chosen, start, _EXACT)
    weight = theta[:, :-1] if num_columns > 2 else theta[:, 0].diag()
    return MatrixScalingFit(identity + weight, theta[:, -1].clone(), floor, T, chosen)


@dataclass(frozen=True)
class _Columns:
    """Features of rows as columns, because sums over few classes are fast along the first axis.

    Args:
        pieces: Parts of the features, [C, n] each, in float64.
        target: Class indices [N].
        num_columns: C + 1 for theta = (A, b); 2 for (diag A, b).
    """

    pieces: Sequence[Tensor]
    target: Tensor
    num_columns: int

    @property
    def is_vector(self) -> bool:
        """Whether A is diagonal."""
        return self.num_columns == 2 and len(self.pieces[0]) > 1

    def part(self, low: int, high: int) -> _Columns:
        """A range of rows."""
        return _Columns([self.pieces[0][:, low:high]], self.target[low:high], self.num_columns)

    def without(self, low: int, high: int) -> _Columns:
        """All rows except a range."""
        x = self.pieces[0]
        target = torch.cat([self.target[:low], self.target[high:]])
        return _Columns([x[:, :low], x[:, high:]], target, self.num_columns)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the features [C, n] and their classes [n], in order."""
        size = max(1, _PART_ELEMENTS // len(self.pieces[0]))
        parts = [part for piece in self.pieces for part in torch.split(piece, size, 1) if part.numel()]
        yield from zip(parts, torch.split(self.target, [part.shape[1] for part in parts]), strict=True)

    def affine(self, x: Tensor, theta: Tensor) -> Tensor:
        """x + A x + b."""
        bias = theta[:, -1:]
        return torch.addcmul(x + bias, x, theta[:, :1]) if self.is_vector else x + torch.addmm(bias, theta[:, :-1], x)

    def sums(self, weights: Tensor, x: Tensor) -> Tensor:
        """Sums over rows of weights [C, n] times features, one for each number in theta."""
        products = (weights * x).sum(1, keepdim=True) if self.is_vector else weights @ x.T
        return torch.cat([products, weights.sum(1, keepdim=True)], 1)

    def losses(self, theta: Tensor) -> Tensor:
        """The negative log-likelihood [N] of each row."""
        return torch.cat([cross_entropy(self.affine(x, theta).T, y, reduction="none") for x, y in self.parts()])

    def loss(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The mean negative log-likelihood and its gradient, in one pass."""
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        for x, y in self.parts():
            z = self.affine(x, theta)
            z -= z.amax(0)
            value -= at_class(z, y, 0).sum()
            probs = z.exp_()
            norm = probs.sum(0)
            value += norm.log().sum()
            errors = probs.div_(norm).scatter_add_(0, y[None], -torch.ones_like(norm)[None])
            gradient += self.sums(errors, x)
        return value / len(self.target), gradient / len(self.target)


@dataclass(frozen=True)
class _Coordinates:
    """Coordinates in which the Hessian of the ridged loss at theta is approximately the identity.

    The Hessian for (A, b) is the mean over rows of (diag p - p p^T) x (x, 1) (x, 1)^T, a Kronecker product for each row. The axes are the
    eigenvectors of the product of the two means, the second weighted by the traces of the first. For (diag A, b), only the diagonal is used.
    """

    curvature: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def at(cls, data: _Columns, theta: Tensor) -> _Coordinates:
        """The coordinates at theta."""
        C = len(data.pieces[0])
        x0 = data.pieces[0]
        if data.is_vector:
            curvature = x0.new_zeros(C, 2)
            for x, _ in data.parts():
                probs = torch.softmax(data.affine(x, theta), 0)
                curvature += data.sums(probs - probs.square(), x.square())
            return cls(curvature / len(data.target), torch.eye(C).to(x0), torch.eye(2).to(x0))
        first, second = x0.new_zeros(C, C), x0.new_zeros(C + 1, C + 1)
        for x, _ in data.parts():
            probs = torch.softmax(data.affine(x, theta), 0)
            first -= probs @ probs.T
            first.diagonal().add_(probs.sum(1))
            features = torch.cat([x, torch.ones_like(x[:1])])
            second += (features * (1 - probs.square().sum(0))) @ features.T
        (of_first, left), (of_second, right) = torch.linalg.eigh(first), torch.linalg.eigh(second)
        share = second.new_tensor(len(data.target)) * first.trace().clamp_min(1e-300)
        return cls(of_first.clamp_min(0)[:, None] * of_second.clamp_min(0) / share, left, right)

    def unit(self, ridge: Tensor) -> Tensor:
        """The length of each axis [C, num_columns]."""
        return (self.curvature + ridge.median()).rsqrt()


def _minimise(data: _Columns, coordinates: _Coordinates, strength: float, start: Tensor, tolerance: float) -> Tensor:
    """The minimum theta of the ridged, strictly convex loss, by L-BFGS, up to a slope of ``tolerance`` along each axis."""
    C, N = len(start), len(data.target)
    ridge = torch.full_like(start, 2 * strength * C / N)
    if not data.is_vector:
        ridge[:, :C] *= C - 1
        ridge[:, :C].diagonal().fill_(2 * strength * C / N)
    unit, left, right = coordinates.unit(ridge), coordinates.left, coordinates.right
    position = left.T @ start @ right / unit
    optimizer = torch.optim.LBFGS(
        [position],
        max_iter=500,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        theta = left @ (position * unit) @ right.T
        penalty = ridge * theta
        value, gradient = data.loss(theta)
        position.grad = left.T @ (gradient + penalty) @ right * unit
        return value + (penalty * theta).sum() / 2

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # untyped in torch
    return left @ (position.detach() * unit) @ right.T
