"""Class-conditional Gaussians over features: statistics in one streaming pass, and the discriminant fitted to them.

:class:`ClassStatistics` holds all that a fit needs, whatever the number of rows; :func:`fit_gaussian` turns it into means
and whitening matrices; :func:`squared_distances` is the one computation that every score is made of. All in float64.

Source: Mukhoti et al., "Deep Deterministic Uncertainty", CVPR 2023 (arXiv 2102.11582), whose density this is; Lee et al.,
NeurIPS 2018 (arXiv 1807.03888), for the shared covariance; Ren et al., arXiv 2106.09022, for the background.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional._validation import check_choice, check_integer

Covariance = Literal["full", "tied", "diagonal"]
Priors = Literal["uniform", "empirical"]
Regularization = Literal["oas", "ddu"] | float

_COVARIANCES = ("full", "tied", "diagonal")
# Relative to the mean variance: enough for a Cholesky factor, too little to be felt.
_TIED_RIDGE = 1e-6
# What the original tries, 0 and 10^-308 to 10^-1, rounds in its float32 identity to these distinct values alone.
_DECADES = torch.tensor([10.0**exponent for exponent in range(-45, 0)], dtype=torch.float64)
DDU_JITTERS: tuple[float, ...] = (0.0, *_DECADES.float().tolist())


class ClassStatistics:
    """Counts, means and scatter matrices of each class, streamed in float64.

    Batches are merged with Chan's update, which never subtracts large sums, so that features far from the origin keep
    their precision, and neither the size nor the order of batches matters beyond rounding. What is kept:

    - ``count`` [C] and ``mean`` [C, D];
    - ``scatter``, the sums of squares about the class means: [C, D, D] with ``covariance="full"``, their sum over
      classes [D, D] with ``"tied"``, the diagonals [C, D] with ``"diagonal"``.

    The scatter of all rows about their common mean (the background) follows from these. Small batches are gathered into
    blocks first, since a rank-one update of [D, D] costs as much as one of rank 60.

    Args:
        num_classes: C.
        num_features: D.
        covariance: "full", "tied" or "diagonal"; from "full" the other two can be fitted as well.
        memory_budget: Bytes that ``scatter`` may take; a fit takes as much again.
        device: Where the sums live; it must have float64.

    Raises:
        InputError: ``scatter`` would exceed ``memory_budget``; nothing has been allocated then.

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983).

    Example:
        >>> statistics = ClassStatistics(num_classes=2, num_features=1)
        >>> statistics.update(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> statistics.update(torch.tensor([[4.0], [7.0]]), torch.tensor([0, 1]))
        >>> statistics.mean, statistics.scatter[0]
        (tensor([[2.],
                [6.]], dtype=torch.float64), tensor([[8.]], dtype=torch.float64))
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        covariance: Covariance = "full",
        memory_budget: int = 4 * 2**30,
        device: torch.device | str = "cpu",
    ) -> None:
        check_integer("num_classes", num_classes, 1)
        check_integer("num_features", num_features, 1)
        check_choice("covariance", covariance, _COVARIANCES)
        C, D = num_classes, num_features
        shape = {"full": (C, D, D), "tied": (D, D), "diagonal": (C, D)}[covariance]
        size = 8 * math.prod(shape)
        if size > memory_budget:
            smaller = {"full": 'covariance="tied"', "tied": 'covariance="diagonal"'}.get(covariance, "fewer features")
            raise InputError(
                f"Expected the scatter matrices to fit into argument `memory_budget` ({memory_budget / 2**30:.3g} GiB), "
                f'but {C} classes of {D} features with covariance="{covariance}" take {size / 2**30:.3g} GiB. Use '
                f"{smaller}, or raise the budget."
            )
        self.covariance: Covariance = covariance
        with torch.inference_mode(False):  # or nothing could be added to them once that mode has ended
            self._count = torch.zeros(C, dtype=torch.float64, device=device)
            self._mean = torch.zeros(C, D, dtype=torch.float64, device=device)
            self._scatter = torch.zeros(shape, dtype=torch.float64, device=device)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_rows = 0
        self._block = max(1024, 64 * C) if covariance == "full" else 1024

    @property
    def num_classes(self) -> int:
        """C."""
        return self._mean.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self._mean.shape[1]

    @property
    def count(self) -> Tensor:
        """Rows seen of each class, [C]."""
        self._flush()
        return self._count

    @property
    def mean(self) -> Tensor:
        """Mean of each class, [C, D]; zero where a class has no rows."""
        self._flush()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """Sums of squares about the class means, in the shape of ``covariance``."""
        self._flush()
        return self._scatter

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: [N, D], of any floating dtype and on any device.
            labels: Class indices [N].

        Raises:
            InputError: Shapes do not fit, a label is out of range, or a feature is NaN or infinite; the class is named.
        """
        self._check(features, labels)
        device = self._mean.device
        for rows, classes in zip(
            torch.split(features.detach(), self._block), torch.split(labels, self._block), strict=True
        ):
            # A copy: the caller may reuse its buffer before the block is full.
            pair = rows.to(device, torch.float64, copy=True), classes.to(device, torch.long, copy=True)
            self._pending.append(pair)
            self._pending_rows += len(rows)
            if self._pending_rows >= self._block:
                self._flush()

    def merge(self, other: ClassStatistics) -> None:
        """Add the rows that ``other`` has seen; it keeps its own.

        Raises:
            InputError: The two differ in classes, features or covariance.
        """
        mine, theirs = (self.covariance, *self._mean.shape), (other.covariance, *other._mean.shape)
        if mine != theirs:
            raise InputError(
                f"Expected argument `other` to hold the same covariance, classes and features {mine}, but got {theirs}."
            )
        self._flush()
        device = self._mean.device
        bridge = self._merge_means(other.count.to(device), other.mean.to(device))
        self._scatter += other.scatter.to(device)
        self._add_outer(bridge)

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Make this the statistics of all ranks, with two rounds of sums and no copy of all ranks' matrices.

        The means are summed first. Each rank then moves its scatter to the common means, after which scatters add: the
        same as :meth:`merge` over all ranks, and the same on each of them. A rank without a row takes part all the same.

        Args:
            all_sum: Sums a float64 tensor over ranks and returns the result, in place or not.

        Example:
            >>> statistics = ClassStatistics(1, 1)
            >>> statistics.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
            >>> statistics.reduce(lambda tensor: 2 * tensor)  # as if two ranks had seen the same rows
            >>> statistics.count, statistics.mean, statistics.scatter
            (tensor([4.], dtype=torch.float64), tensor([[2.]], dtype=torch.float64), tensor([[[4.]]], dtype=torch.float64))
        """
        self._flush()
        own_count, own_mean = self._count, self._mean
        self._count = all_sum(own_count.clone())
        self._mean = all_sum(own_count[:, None] * own_mean) / self._count.clamp_min(1)[:, None]
        self._add_outer((own_mean - self._mean) * own_count.sqrt()[:, None])
        self._scatter = all_sum(self._scatter)

    def background(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and scatter [D, D] (or [D] with "diagonal") of all rows, whatever their class."""
        count, mean = self.count, self.mean
        center = (count[:, None] * mean).sum(0) / count.sum()
        spread = (mean - center) * count.sqrt()[:, None]
        if self.covariance == "diagonal":
            return center, self.scatter.sum(0) + spread.square().sum(0)
        within = self.scatter if self.covariance == "tied" else self.scatter.sum(0)
        return center, within + spread.T @ spread

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if not features.is_floating_point() or features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(
                f"Expected argument `features` to be a floating-point tensor [N, {self.num_features}], but got "
                f"{features.dtype} of shape {list(features.shape)}."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != features.shape[:1]:
            raise InputError(
                f"Expected argument `labels` to be class indices of shape [{len(features)}], but got {labels.dtype} of "
                f"shape {list(labels.shape)}."
            )
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise InputError(
                f"Expected argument `labels` to hold class indices in [0, {self.num_classes}), but got {int(wrong[0])}."
            )
        finite = features.isfinite()
        if not bool(finite.all()):
            row = int((~finite.all(1)).nonzero()[0])
            value = features[row][~finite[row]][0].item()
            raise InputError(
                f"Expected argument `features` to hold finite numbers, but got {value} in a row of class {int(labels[row])}."
            )

    def _flush(self) -> None:
        if not self._pending:
            return
        x, y = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._pending_rows = [], 0
        order = y.argsort(stable=True)
        x, y = x[order], y[order]
        rows = torch.bincount(y, minlength=self.num_classes)
        count = rows.double()
        mean = torch.zeros_like(self._mean).index_add_(0, y, x) / count.clamp_min(1)[:, None]
        x -= mean[y]
        bridge = self._merge_means(count, mean)
        if self.covariance == "full":
            for scatter, part, step in zip(self._scatter, torch.split(x, rows.tolist()), bridge, strict=True):
                if len(part):
                    part = torch.cat([part, step[None]])
                    scatter.addmm_(part.T, part)
        elif self.covariance == "tied":
            self._scatter.addmm_(x.T, x)
            self._add_outer(bridge)
        else:
            self._scatter.index_add_(0, y, x.square())
            self._add_outer(bridge)

    def _merge_means(self, count: Tensor, mean: Tensor) -> Tensor:
        """Take in rows of these counts and means; return [C, D] whose squares are what the scatter gains by the move."""
        total = (self._count + count).clamp_min(1)
        step = mean - self._mean
        bridge = step * (self._count * count / total).sqrt()[:, None]
        self._mean += step * (count / total)[:, None]
        self._count += count
        return bridge

    def _add_outer(self, vectors: Tensor) -> None:
        """Add each class's outer product v v^T, [C, D] -> the shape of the scatter."""
        if self.covariance == "full":
            for scatter, vector in zip(self._scatter, vectors, strict=True):
                scatter.addr_(vector, vector)
        elif self.covariance == "tied":
            self._scatter.addmm_(vectors.T, vectors)
        else:
            self._scatter += vectors.square()


class GaussianFit(NamedTuple):
    """A fitted discriminant: plain tensors in float64.

    Attributes:
        mean: [C, D].
        whitening: A_c with Sigma_c^-1 = A_c^T A_c: the inverse Cholesky factors [C, D, D], a single one [1, D, D] where
            tied, the inverse standard deviations [C, D] where diagonal.
        log_det: log |Sigma_c|, [C].
        log_prior: log pi_c, [C].
        background_mean: Mean of all rows, [D].
        background_whitening: The same for all rows as one class: [1, D, D], or [1, D] where diagonal.
        shrinkage: The common intensity r in [0, 1]; 0 without shrinkage.
        ridge: What was added to every variance, in squared units of the features; with shrinkage, r tr(W) / D.
    """

    mean: Tensor
    whitening: Tensor
    log_det: Tensor
    log_prior: Tensor
    background_mean: Tensor
    background_whitening: Tensor
    shrinkage: Tensor
    ridge: Tensor


def fit_gaussian(
    statistics: ClassStatistics,
    covariance: Covariance | None = None,
    priors: Priors = "uniform",
    regularization: Regularization = "oas",
) -> GaussianFit:
    """Fit one Gaussian a class to streamed statistics.

    Covariances are unbiased: S_c over n_c - 1, the pooled within-class W over N - C, the background over N - 1.

    - ``"oas"``: (1 - r) S_c + r (tr W / D) I. The oracle-approximating intensity of each class (see
      :func:`oas_intensity`) is averaged to one r, and all share one target, since log-determinants under different
      regularisation cannot be compared. A tied covariance has rows enough and takes W + 1e-6 (tr W / D) I; so does the
      background.
    - a float: that much, in squared units of the features, is added to every variance, the background's as well; 0.0 is
      legal.
    - ``"ddu"``: the original's: the smallest of 0, 1e-45, 1e-44, ..., 0.1 with which every class factors. Densities of
      rank-deficient features are then rounding noise; it is here for comparison.

    Args:
        statistics: What was streamed.
        covariance: "full", "tied" or "diagonal"; the statistics' own by default.
        priors: "uniform" (1 / C) or "empirical" (n_c / N).
        regularization: "oas", "ddu" or a float.

    Returns:
        The fit.

    Raises:
        InputError: A class has fewer than two rows; a covariance is not positive definite; the statistics lack what
            ``covariance`` needs.

    Warns:
        UserWarning: A covariance that is not shrunk has rank below D.

    Source: Chen et al., "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58 (2010), arXiv 0907.4698.

    Example:
        >>> statistics = ClassStatistics(num_classes=1, num_features=2)
        >>> statistics.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]]), torch.zeros(3, dtype=torch.long))
        >>> fit_gaussian(statistics, regularization=0.0).mean
        tensor([[1., 1.]], dtype=torch.float64)
    """
    kind = statistics.covariance if covariance is None else covariance
    check_choice("covariance", kind, _COVARIANCES)
    check_choice("priors", priors, ("uniform", "empirical"))
    _check_regularization(regularization)
    if kind != statistics.covariance and statistics.covariance != "full":
        raise InputError(
            f'Expected argument `covariance` to be "{statistics.covariance}", which the statistics were streamed for, but '
            f'got "{kind}".'
        )
    C, D = statistics.num_classes, statistics.num_features
    count, total = statistics.count, statistics.count.sum()
    if bool((count < 2).any()):
        few = (count < 2).nonzero().flatten().tolist()
        named = ", ".join(f"class {c} has {int(count[c])}" for c in few[:5]) + (" ..." if len(few) > 5 else "")
        raise InputError(f"Expected at least 2 rows of every class, but {named}.")
    scatter = statistics.scatter
    if kind != statistics.covariance:
        scatter = scatter.sum(0) if kind == "tied" else scatter.diagonal(dim1=-2, dim2=-1)
    if regularization != "oas" or kind == "tied":
        _warn_rank(kind, count, D)

    freedom = (total - C)[None] if kind == "tied" else count - 1

    def class_covariance(c: int) -> Tensor:
        return (scatter if kind == "tied" else scatter[c]) / freedom[c]

    number = 1 if kind == "tied" else C
    mean_variance = float(_trace(scatter, kind).sum() / (total - C) / D)
    center, spread = statistics.background()
    if kind == "diagonal" and spread.ndim == 2:
        spread = spread.diagonal()
    spread = spread / (total - 1)

    shrinkage, background_ridge = 0.0, _TIED_RIDGE * mean_variance
    if regularization == "ddu":
        ridge = _ddu_jitter(class_covariance, number)
        background_ridge = _ddu_jitter(lambda _: spread.clone(), 1, at_least=ridge)
    elif regularization == "oas" and kind == "tied":
        ridge = background_ridge
    elif regularization == "oas":
        intensities = [oas_intensity(class_covariance(c), float(freedom[c])) for c in range(number)]
        shrinkage = float(torch.stack(intensities).mean())
        ridge = shrinkage * mean_variance
    else:
        ridge = background_ridge = float(regularization)

    whitening = scatter.new_empty((number, *spread.shape))
    log_det = scatter.new_empty(number)
    for c in range(number):
        matrix = class_covariance(c).mul_(1 - shrinkage)
        name = "the tied covariance" if kind == "tied" else f"the covariance of class {c}"
        whitening[c], log_det[c] = _whiten(_add_ridge(matrix, ridge), name, regularization)
    background, _ = _whiten(_add_ridge(spread, background_ridge), "the background covariance", regularization)
    uniform = torch.full_like(count, -math.log(C))
    return GaussianFit(
        mean=statistics.mean.clone(),
        whitening=whitening,
        log_det=log_det.expand(C).clone(),
        log_prior=uniform if priors == "uniform" else (count / total).log(),
        background_mean=center,
        background_whitening=background[None],
        shrinkage=count.new_tensor(shrinkage),
        ridge=count.new_tensor(ridge),
    )


def oas_intensity(covariance: Tensor, freedom: float) -> Tensor:
    """How far to shrink an unbiased covariance S towards (tr S / D) I, in [0, 1].

    For S [D, D] of nu degrees of freedom the oracle-approximating intensity

        r = ((1 - 2/D) |S|_F^2 + tr(S)^2) / ((nu + 1 - 2/D) (|S|_F^2 - tr(S)^2 / D)).

    For the variances S [D] of a diagonal model, of which there are only D to estimate, the oracle under a Gaussian,
    whose variances err by 2 sigma^4 / nu, with unbiased estimates of its terms:

        r = 2 / (nu + 2) (1 - 1/D) |S|^2 / (|S|^2 - (sum S)^2 / D).

    Args:
        covariance: [D, D], or [D] for a diagonal.
        freedom: nu, the number of rows less one.

    Returns:
        A scalar; 1 where S is a multiple of the identity, 0 where D = 1.

    Source: Chen et al., IEEE TSP 58 (2010), equation 23.

    Example:
        >>> oas_intensity(torch.diag(torch.tensor([1.0, 3.0, 5.0])), freedom=20.0).round(decimals=3)
        tensor(0.5700)
    """
    D = covariance.shape[-1]
    squared = covariance.square().sum()
    trace = (covariance if covariance.ndim == 1 else covariance.diagonal()).sum()
    if D == 1:
        return torch.zeros_like(trace)
    anisotropy = squared - trace.square() / D
    if covariance.ndim == 1:
        excess = 2 / (freedom + 2) * (1 - 1 / D) * squared
    else:
        excess = ((1 - 2 / D) * squared + trace.square()) / (freedom + 1 - 2 / D)
    return torch.where(excess < anisotropy, excess / anisotropy, 1.0)


def squared_distances(features: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Squared Mahalanobis distances |A_c (f - mu_c)|^2, one matrix product a class.

    Args:
        features: [N, D].
        mean: [C, D].
        whitening: A, as in :class:`GaussianFit`: [C, D, D], [1, D, D] or [C, D].

    Returns:
        [N, C] in float64; the products run in the dtype of ``features``, which ``mean`` and ``whitening`` share.

    Example:
        >>> squared_distances(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]))
        tensor([[2.2500]], dtype=torch.float64)
    """
    if whitening.ndim == 3 and len(whitening) == 1 < len(mean):
        # One product for all classes; the cancellation in the expanded square is left to float64.
        points, centers = (features @ whitening[0].T).double(), (mean @ whitening[0].T).double()
        squares = points.square().sum(1, keepdim=True) + centers.square().sum(1)
        return (squares - 2 * points @ centers.T).clamp_min(0)
    columns = []
    for center, matrix in zip(mean, whitening, strict=True):
        offset = features - center  # before the product: an expanded square would cancel
        white = offset * matrix if matrix.ndim == 1 else offset @ matrix.T
        columns.append(white.square().sum(1).double())
    return torch.stack(columns, 1)


def _check_regularization(value: object) -> None:
    if value in ("oas", "ddu"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(
            f"Expected argument `regularization` to be 'oas', 'ddu' or a finite number of at least 0, but got {value!r}."
        )


def _warn_rank(kind: Covariance, count: Tensor, D: int) -> None:
    if kind == "tied" and int(count.sum()) - len(count) < D:
        warnings.warn(
            f"The tied covariance of {D} features was estimated from {int(count.sum())} rows of {len(count)} classes and "
            'is rank-deficient, so that distances are mostly its regularisation. Use covariance="diagonal", or full '
            'covariances with regularization="oas".',
            stacklevel=3,
        )
    elif kind == "full" and bool((count <= D).any()):
        c = int(count.argmin())
        warnings.warn(
            f"Class {c} has {int(count[c])} rows for {D} features, so that its covariance is rank-deficient and densities "
            'are dominated by the regularisation. Use regularization="oas" or covariance="tied".',
            stacklevel=3,
        )


def _trace(scatter: Tensor, kind: Covariance) -> Tensor:
    return scatter if kind == "diagonal" else scatter.diagonal(dim1=-2, dim2=-1)


def _add_ridge(covariance: Tensor, ridge: float) -> Tensor:
    """The covariance [D, D] or [D], changed in place."""
    (covariance if covariance.ndim == 1 else covariance.diagonal()).add_(ridge)
    return covariance


def _cholesky(covariance: Tensor) -> Tensor | None:
    """The factor [D, D], or the standard deviations [D]; None where it is not positive definite."""
    if covariance.ndim == 1:
        return covariance.sqrt() if bool((covariance > 0).all()) else None
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor if int(info) == 0 and bool(factor.diagonal().isfinite().all()) else None


def _whiten(covariance: Tensor, name: str, regularization: object) -> tuple[Tensor, Tensor]:
    """The inverse factor and the log-determinant."""
    factor = _cholesky(covariance)
    if factor is None:
        constant = bool((_trace(covariance, "diagonal" if covariance.ndim == 1 else "full") <= 0).all())
        reason = "all features are constant" if constant else "features are constant or linearly dependent"
        raise InputError(
            f"Expected a positive definite covariance, but with regularization={regularization!r} {name} is not: {reason}. "
            'Use regularization="oas", or a larger float.'
        )
    if covariance.ndim == 1:
        return factor.reciprocal(), 2 * factor.log().sum()
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False), 2 * factor.diagonal().log().sum()


def _ddu_jitter(covariance_of: Callable[[int], Tensor], number: int, at_least: float = 0.0) -> float:
    """The smallest jitter with which all covariances factor, with no attempt that cannot differ from the one before."""
    jitters = [jitter for jitter in DDU_JITTERS if jitter >= at_least]
    position, agreed, c = 0, 0, 0
    # Rounding makes success no monotone function of the jitter: a rise of one class sends all others to a new attempt.
    while agreed < number:
        covariance = covariance_of(c)
        diagonal = (covariance if covariance.ndim == 1 else covariance.diagonal()).clone()
        tried = None
        while True:
            if position == len(jitters):
                raise InputError(
                    f"Expected a positive definite covariance, but class {c} has none with any jitter of "
                    'regularization="ddu", up to 0.1. Use regularization="oas".'
                )
            raised = diagonal + jitters[position]
            if tried is None or not torch.equal(raised, tried):
                tried = raised
                (covariance if covariance.ndim == 1 else covariance.diagonal()).copy_(raised)
                if _cholesky(covariance) is not None:
                    break
                agreed = 0
            position += 1
        agreed, c = agreed + 1, (c + 1) % number
    return jitters[position]
