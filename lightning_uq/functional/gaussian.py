"""One Gaussian per class over features: the discriminant fitted to sufficient statistics, in float64.

:class:`~lightning_uq.networks.class_statistics.ClassStatistics` gathers the statistics in one streaming pass.

Source: Mukhoti et al., "Deep Deterministic Uncertainty", CVPR 2023 (arXiv 2102.11582), for the density; Lee et al., NeurIPS
2018 (arXiv 1807.03888), for the shared covariance; Ren et al., arXiv 2106.09022, for the background.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.held_out_shrinkage import FLOOR, TARGETS, Moments, Shrinkage, shrinkage_target
from lightning_uq.functional.shrinkage import oas_intensity
from lightning_uq.functional.validation import check_choice
from lightning_uq.functional.whitening import add_ridge, ddu_jitter, whiten

Covariance = Literal["full", "tied", "diagonal"]
Priors = Literal["uniform", "empirical"]
Regularization = Literal["held_out", "oas", "ddu"] | float
COVARIANCES = ("full", "tied", "diagonal")


class ClassMoments(Moments, Protocol):
    """Sufficient statistics of classes, from which a Gaussian is fitted; :class:`~lightning_uq.networks.class_statistics.ClassStatistics` has them.

    The scatter is [C, D, D] for "full", [D, D] for "tied", [C, D] for "diagonal".
    """

    @property
    def covariance(self) -> Covariance:
        """Which of the three the scatter is for."""


@dataclass(frozen=True)
class PlainMoments:
    """Statistics that were not streamed: count [C], mean [C, D] and scatter, as :class:`ClassMoments` has them."""

    covariance: Covariance
    count: Tensor
    mean: Tensor
    scatter: Tensor


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
        target: What they were shrunk towards, by its place in :data:`~lightning_uq.functional.held_out_shrinkage.TARGETS`; -1 without shrinkage.
        ridge: What was added to every variance, in squared units of the features; with "oas", r tr(W) / D.
    """

    mean: Tensor
    whitening: Tensor
    log_det: Tensor
    log_prior: Tensor
    background_mean: Tensor
    background_whitening: Tensor
    shrinkage: Tensor
    target: Tensor
    ridge: Tensor


def check_class_counts(count: Tensor) -> None:
    """Refuse classes of which there are fewer than two rows, from the numbers of rows [C].

    Raises:
        InputError: There are such classes.
    """
    few = (count < 2).nonzero().flatten().tolist()
    if few:
        named = ", ".join(f"class {c} has {int(count[c])}" for c in few[:5]) + (" ..." if len(few) > 5 else "")
        raise InputError(f"Every class needs at least 2 rows, but {named}.")


def fit_gaussian(
    statistics: ClassMoments,
    covariance: Covariance | None = None,
    priors: Priors = "uniform",
    regularization: Regularization | Shrinkage = "oas",
) -> GaussianFit:
    """Fit one Gaussian a class to streamed statistics.

    Covariances are unbiased: S_c over n_c - 1, the pooled within-class W over N - C, the background over N - 1.

    - a :class:`~lightning_uq.functional.held_out_shrinkage.Shrinkage`, which ``"held_out"`` finds where the rows were streamed in two halves:
      (1 - r) S_c + r T + 1e-6 (tr W / D) I. A tied covariance takes W + 1e-6 (tr W / D) I; so does the background.
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
        regularization: A Shrinkage, "oas", "ddu" or a float.

    Returns:
        The fit.

    Raises:
        InputError: A class has fewer than two rows; a covariance is not positive definite; the statistics lack what
            ``covariance`` needs.

    Warns:
        UserWarning: A covariance that is not shrunk has rank below D.

    Source: Chen et al., "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58 (2010), arXiv 0907.4698.

    Example:
        >>> from lightning_uq.networks.class_statistics import ClassStatistics
        >>> statistics = ClassStatistics(num_classes=1, num_features=2)
        >>> statistics.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]]), torch.zeros(3, dtype=torch.long))
        >>> fit_gaussian(statistics, regularization=0.0).mean
        tensor([[1., 1.]], dtype=torch.float64)
    """
    kind = statistics.covariance if covariance is None else covariance
    check_choice("covariance", kind, COVARIANCES)
    check_choice("priors", priors, ("uniform", "empirical"))
    if not isinstance(regularization, Shrinkage):
        check_regularization(regularization)
        if regularization == "held_out":
            raise InputError(
                "`regularization='held_out'` compares two halves of the rows, but these statistics are of all of them: stream them "
                "into `ClassHalves`, whose `fit` takes it."
            )
    is_shrunk = isinstance(regularization, Shrinkage) or regularization == "oas"
    if kind != statistics.covariance and statistics.covariance != "full":
        raise InputError(
            f'`covariance` must be "{statistics.covariance}", which the statistics were streamed for, but it is "{kind}".'
        )
    C, D = statistics.mean.shape
    count, total = statistics.count, statistics.count.sum()
    check_class_counts(count)
    scatter = statistics.scatter
    if kind != statistics.covariance:
        scatter = scatter.sum(0) if kind == "tied" else scatter.diagonal(dim1=-2, dim2=-1)
    if not is_shrunk or kind == "tied":
        _warn_rank(kind, count, D)

    freedom = (total - C)[None] if kind == "tied" else count - 1

    def class_covariance(c: int) -> Tensor:
        return (scatter if kind == "tied" else scatter[c]) / freedom[c]

    number = 1 if kind == "tied" else C
    variance = _variances(scatter, kind).sum() / (total - C) / D
    floor = FLOOR * float(variance)
    center, spread = background_moments(statistics)
    if kind == "diagonal" and spread.ndim == 2:
        spread = spread.diagonal()
    spread = spread / (total - 1)

    towards, shrinkage, place, background_ridge = None, 0.0, -1, floor
    if regularization == "ddu":
        ridge = ddu_jitter(class_covariance, number)
        background_ridge = ddu_jitter(lambda _: spread.clone(), 1, at_least=ridge)
    elif is_shrunk and kind == "tied":
        ridge = floor
    elif isinstance(regularization, Shrinkage):
        shrinkage, ridge, place = regularization.intensity, floor, TARGETS.index(regularization.target)
        towards = shrinkage_target(scatter.sum(0) / (total - C), regularization.target) * shrinkage
    elif is_shrunk:
        intensities = [oas_intensity(class_covariance(c), float(freedom[c])) for c in range(number)]
        shrinkage = float(torch.stack(intensities).mean())
        ridge, place = shrinkage * float(variance), TARGETS.index("identity")
    else:
        ridge = background_ridge = float(regularization)

    whitening = scatter.new_empty((number, *spread.shape))
    log_det = scatter.new_empty(number)
    for c in range(number):
        matrix = class_covariance(c).mul_(1 - shrinkage)
        if towards is not None:
            matrix += towards
        name = "the tied covariance" if kind == "tied" else f"the covariance of class {c}"
        whitening[c], log_det[c] = whiten(add_ridge(matrix, ridge), name, regularization)
    background, _ = whiten(add_ridge(spread, background_ridge), "the background covariance", regularization)
    uniform = torch.full_like(count, -math.log(C))
    return GaussianFit(
        mean=statistics.mean.clone(),
        whitening=whitening,
        log_det=log_det.expand(C).clone(),
        log_prior=uniform if priors == "uniform" else (count / total).log(),
        background_mean=center,
        background_whitening=background[None],
        shrinkage=count.new_tensor(shrinkage),
        target=count.new_tensor(place),
        ridge=count.new_tensor(ridge),
    )


def background_moments(statistics: ClassMoments) -> tuple[Tensor, Tensor]:
    """Mean [D] and scatter [D, D] (or [D] with "diagonal") of all rows, whatever their class."""
    count, mean = statistics.count, statistics.mean
    center = (count[:, None] * mean).sum(0) / count.sum()
    spread = (mean - center) * count.sqrt()[:, None]
    if statistics.covariance == "diagonal":
        return center, statistics.scatter.sum(0) + spread.square().sum(0)
    within = statistics.scatter if statistics.covariance == "tied" else statistics.scatter.sum(0)
    return center, within + spread.T @ spread


def check_regularization(value: object) -> None:
    """Refuse what is no regularisation.

    Raises:
        InputError: It is neither a name nor a finite number of at least 0.
    """
    if value in ("held_out", "oas", "ddu"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(
            f"`regularization` must be 'held_out', 'oas', 'ddu' or a finite number of at least 0, but it is {value!r}."
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


def _variances(scatter: Tensor, kind: Covariance) -> Tensor:
    """The diagonals of a scatter."""
    return scatter if kind == "diagonal" else scatter.diagonal(dim1=-2, dim2=-1)
