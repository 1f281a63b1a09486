"""Matrix scaling: an affine map of log-probabilities, held near a temperature by a ridge on every deviation from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
_WEIGHTS_PER_ROW = 10  # above it the weights between classes, C (C - 1), are left out
_NO_FLOOR = -1e4  # far below any log-probability, but finite, as stored tensors are
_MARGIN = 0.75  # standard errors; chosen on classifiers of KITTI, MNIST and PCam
_PART_ELEMENTS = 2**19  # what a cache holds
_FOLD_ELEMENTS = 2**22  # above it one fold is held out, not each in turn


class MatrixScalingFit(NamedTuple):
    """A fitted matrix scaling.

    Attributes:
        weight: [C, C] in float64; the identity where the temperature won.
        bias: [C] in float64; all 0 where the temperature won.
        floor: The log-probability below which the features level off, a scalar in float64; -10,000 where the temperature won.
        temperature: T of all rows, a scalar in float64.
        strength: The strength that validation chose; infinite where the temperature won.
    """

    weight: Tensor
    bias: Tensor
    floor: Tensor
    temperature: Tensor
    strength: float

    @property
    def class_matrix(self) -> Tensor:
        """All of it as one tensor [C + 3, C]: the rows of the weight, the bias, and for each class the floor and 1 / T."""
        rows = (self.bias, self.floor.expand_as(self.bias), (1 / self.temperature).expand_as(self.bias))
        return torch.cat([self.weight, torch.stack(rows)])


def apply_matrix_scaling(log_probs: Tensor, class_matrix: Tensor) -> Tensor:
    """log softmax(W x + b), with x = log(softmax(l / T) + exp floor): log-probabilities [N, C, ...] -> [N, C, ...].

    A class that a row rules out by minus infinity stays ruled out. NaN stays NaN.

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
    if torch.is_autocast_enabled(device):  # it would round the product to half precision
        with torch.autocast(device, enabled=False):
            scaled = linear(x, weight, bias.squeeze(0))
    else:
        scaled = linear(x, weight, bias.squeeze(0))
    return torch.log_softmax(scaled.movedim(-1, 1).masked_fill(excluded, -math.inf), 1)


def _features(tempered: Tensor, floor: Tensor) -> Tensor:
    """log(softmax(l / T) + exp floor) of tempered logits [..., C]."""
    log_probs = torch.log_softmax(tempered, -1)
    log_probs = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
    # Not torch.logaddexp, which ONNX has as log(exp + exp): minus infinity where both underflow.
    return torch.maximum(log_probs, floor) + (-(log_probs - floor).abs()).exp().log1p()


def fit_matrix_scaling(
    logits: Tensor, target: Tensor, strengths: Sequence[float] = _STRENGTHS, num_folds: int = 5
) -> MatrixScalingFit:
    """Fit an affine map of log-probabilities with a ridge towards the fitted temperature.

    With x = log(softmax(l / T) + e), e = 1 / (C (N + 1)) as if one more row were uniform, the deviations A [C, C] and bias b from
    the temperature minimise the convex

        mean_n -log softmax(x_n + A x_n + b)_y + strength (C / N) (|diag A|^2 + |b|^2) + strength (C (C - 1) / N) |offdiag A|^2.

    The more rows there are per weight, the weaker the ridge, and a strength of 1 suits most classifiers. Another of the
    ``strengths``, or the temperature alone, replaces it where the likelihood of the held-out fifths of a five-fold split is
    better by more than 0.75 standard errors of the rows' differences. With more than ten weights between classes per row (as
    for 1,000 classes and fewer than 100,000 rows) A is diagonal. Above four million logits the strength is chosen on one fold.

    Args:
        logits: Logits or log-probabilities [N, C] (or [N, C, ...], each position a row) of held-out rows.
        target: Class indices [N] (or [N, ...]).
        strengths: Strengths to choose from, positive; the one that is nearest 1 on a log scale is the default.
        num_folds: Number of folds, at least 2.

    Returns:
        The fit; :attr:`MatrixScalingFit.class_matrix` is for :func:`apply_matrix_scaling`.

    Raises:
        InputError: As for :func:`~lightning_uq.functional.temperature.fit_temperature`; fewer rows than folds; a strength
            that is not positive; more than some twenty thousand classes, whose matrix would take over 4 GiB.

    Warns:
        UserWarning: The temperature has no finite optimum; or a class has no row, and the temperature did not win.

    Source: Berta, Holzmüller, Jordan & Bach, "Structured matrix scaling for multi-class calibration" (arXiv 2511.03685), for the
    penalties and their scaling with N and C; the choice of the strength is this package's.

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
            f"`logits` must have so few classes that a matrix of {_MAX_BYTES / 2**30:.3g} GiB does, but that of {C} classes takes "
            f"{size / 2**30:.3g} GiB. Fit a temperature."
        )
    if num_folds > N:
        raise InputError(f"`logits` must hold at least {num_folds} rows, one per fold, but it holds {N}.")
    if not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise InputError(f"`strengths` must hold positive numbers, but it holds {list(strengths)!r}.")
    T = fit_temperature(logits, target).to(rows.device)
    floor = rows.new_tensor(-math.log(C * (N + 1)))
    tempered = rows[0] / T
    x = _features(tempered, floor)
    num_columns = C + 1 if C * (C - 1) <= _WEIGHTS_PER_ROW * N else 2

    path = sorted(strengths, reverse=True)  # each starts at the solution of the stronger one
    losses: list[list[Tensor]] = [[] for _ in path]
    held_out: list[Tensor] = []
    # Shuffled, since rows may lie in the order of their classes; by a fixed seed, so that two fits are equal.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(x.device)
    for held in torch.tensor_split(order, num_folds)[: num_folds if x.numel() <= _FOLD_ELEMENTS else 1]:
        kept = torch.ones(N, dtype=torch.bool, device=x.device).index_fill(0, held, False)
        held_out.append(held)
        start = x.new_zeros(C, num_columns)
        for strength, of_strength in zip(path, losses, strict=True):
            start = _minimise(x[kept], classes[kept], strength, start)
            of_strength.append(_nll(_affine(x[held], start), classes[held]))
    held = torch.cat(held_out)
    candidates = {math.inf: _nll(tempered[held], classes[held])} | {
        s: torch.cat(v) for s, v in zip(path, losses, strict=True)
    }
    default = min(path, key=lambda strength: abs(math.log(strength)))
    best = min(candidates, key=lambda strength: float(candidates[strength].mean()))
    gain = candidates[default] - candidates[best]
    chosen = best if gain.mean() > _MARGIN * standard_errors(gain) else default
    if chosen == math.inf:
        return MatrixScalingFit(x.new_ones(C).diag(), x.new_zeros(C), x.new_tensor(_NO_FLOOR), T, math.inf)
    warn_of_missing_classes(rows[0], classes)
    theta = _minimise(x, classes, chosen, x.new_zeros(C, num_columns))
    weight = theta[:, :-1] if num_columns > 2 else theta[:, 0].diag()
    return MatrixScalingFit(x.new_ones(C).diag() + weight, theta[:, -1].clone(), floor, T, chosen)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")


def _affine(x: Tensor, theta: Tensor) -> Tensor:
    """x + A x + b, with theta [C, C + 1] = (A, b), or [C, 2] = (diag A, b)."""
    C = x.shape[1]
    if theta.shape[1] == 2 and C > 1:
        return torch.addcmul(theta[:, 1], x, 1 + theta[:, 0])
    return x + torch.addmm(theta[:, C], x, theta[:, :C].T)


def _minimise(x: Tensor, target: Tensor, strength: float, start: Tensor) -> Tensor:
    """The minimum theta of the ridged, strictly convex loss, by L-BFGS in coordinates in which the Hessian at 0 has a diagonal of 1."""
    N, C = x.shape
    is_vector = start.shape[1] == 2 and C > 1
    ridge = torch.full_like(start, 2 * strength * C / N)
    if not is_vector:
        ridge[:, :C] *= C - 1
        ridge[:, :C].diagonal().fill_(2 * strength * C / N)

    def sums(weights: Tensor, values: Tensor) -> Tensor:
        """Sums over rows, one for each number in theta."""
        products = (weights * values).sum(0)[:, None] if is_vector else weights.T @ values
        return torch.cat([products, weights.sum(0)[:, None]], 1)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, _PART_ELEMENTS // C)
        return zip(torch.split(x, size), torch.split(target, size), strict=True)

    curvature = torch.zeros_like(start)
    for rows, _ in parts():
        probs = torch.softmax(rows, 1)
        curvature += sums(probs - probs.square(), rows.square())
    minus_one = -x.new_ones(N, 1)
    unit = (curvature / N + ridge).rsqrt()
    position = start / unit
    optimizer = torch.optim.LBFGS(
        [position],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        theta = position * unit
        penalty = ridge * theta
        value, gradient = (penalty * theta).sum() / 2, penalty.clone()
        for rows, classes in parts():
            log_probs = torch.log_softmax(_affine(rows, theta), 1)
            value -= at_class(log_probs, classes, 1).sum() / N
            errors = log_probs.exp_().scatter_add_(1, classes[:, None], minus_one[: len(rows)])
            gradient += sums(errors, rows) / N
        position.grad = gradient * unit
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return position.detach() * unit
