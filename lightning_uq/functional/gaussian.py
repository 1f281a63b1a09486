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
    """Sufficient statistics of classes, to which Gaussians are fitted; see :class:`~lightning_uq.networks.class_statistics.ClassStatistics`.

    The scatter is [C, D, D] for "full", [D, D] for "tied", and [C, D] for "diagonal".
    """

    @property
    def covariance(self) -> Covariance:
        """The covariance type of the scatter."""


@dataclass(frozen=True)
class PlainMoments:
    """Statistics that were not streamed: count [C], mean [C, D] and scatter, as in :class:`ClassMoments`."""

    covariance: Covariance
    count: Tensor
    mean: Tensor
    scatter: Tensor


class GaussianFit(NamedTuple):
    """A fitted discriminant: plain tensors in float64.

    Attributes:
        mean: [C, D].
        whitening: A_c with Sigma_c^-1 = A_c^T A_c: the inverse Cholesky factors [C, D, D]; one factor [1, D, D] if tied; the
            inverse standard deviations [C, D] if diagonal.
        log_det: log |Sigma_c|, [C].
        log_prior: log pi_c, [C]; minus infinity for a class without a Gaussian, whose other tensors have no meaning.
        background_mean: Mean of all rows, [D].
        background_whitening: The same for all rows as one class: [1, D, D], or [1, D] if diagonal.
        shrinkage: The common intensity r in [0, 1]; 0 without shrinkage.
        target: Shrinkage target, as an index of :data:`~lightning_uq.functional.held_out_shrinkage.TARGETS`; -1 without shrinkage.
        ridge: Number added to every variance, in squared units of the features; with "oas", r tr(W) / D.
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


def check_class_counts(count: Tensor, absent: int | None = None) -> None:
    """Refuse classes with fewer than two rows, given the numbers of rows [C]; the class ``absent`` needs none.

    Raises:
        InputError: A class has fewer than two rows.
    """
    few = [c for c in (count < 2).nonzero().flatten().tolist() if c != absent]
    if few:
        named = ", ".join(f"class {c} has {int(count[c])}" for c in few[:5]) + (" ..." if len(few) > 5 else "")
        raise InputError(f"Every class needs at least 2 rows, but {named}.")


def fit_gaussian(
    statistics: ClassMoments,
    covariance: Covariance | None = None,
    priors: Priors = "uniform",
    regularization: Regularization | Shrinkage = "oas",
    absent: int | None = None,
) -> GaussianFit:
    """Fit one Gaussian per class to streamed statistics.

    Covariances are unbiased: S_c is divided by n_c - 1, the pooled within-class W by N - C, the background by N - 1.

    - A :class:`~lightning_uq.functional.held_out_shrinkage.Shrinkage` (found by ``"held_out"``, if the rows were streamed in two halves):
      (1 - r) S_c + r T + 1e-6 (tr W / D) I. A tied covariance is W + 1e-6 (tr W / D) I, as is the background.
    - ``"oas"``: (1 - r) S_c + r (tr W / D) I. The oracle-approximating intensities of the classes (see
      :func:`oas_intensity`) are averaged to one r, and all classes share one target, since log-determinants with different
      regularisation are not comparable. A tied covariance has enough rows and is W + 1e-6 (tr W / D) I, as is the
      background.
    - A float is added to every variance, including the background's, in squared units of the features; 0.0 is
      allowed.
    - ``"ddu"``, the original's: the smallest of 0, 1e-45, 1e-44, ..., 0.1 with which every class has a Cholesky factor. For
      rank-deficient features, densities are then rounding noise; it exists for comparison.

    Args:
        statistics: The streamed statistics.
        covariance: "full", "tied" or "diagonal"; default: the covariance of the statistics.
        priors: "uniform" (1 / C) or "empirical" (n_c / N).
        regularization: A Shrinkage, "oas", "ddu" or a float.
        absent: A class that has no Gaussian, because its label is ignored. Its prior is 0, and C above counts the others.

    Returns:
        The fit.

    Raises:
        InputError: A class has fewer than two rows, a covariance is not positive definite, or the statistics lack what
            ``covariance`` needs.

    Warns:
        UserWarning: A covariance without shrinkage has rank below D.

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
                "`regularization='held_out'` compares two halves of the rows, but these statistics cover all rows. Stream the rows "
                "into `ClassHalves`, whose `fit` supports it."
            )
    is_shrunk = isinstance(regularization, Shrinkage) or regularization == "oas"
    if kind != statistics.covariance and statistics.covariance != "full":
        raise InputError(
            f'`covariance` must be "{statistics.covariance}", for which the statistics were streamed, but it is "{kind}".'
        )
    C, D = statistics.mean.shape
    count, total = statistics.count, statistics.count.sum()
    check_class_counts(count, absent)
    present = [c for c in range(C) if c != absent]
    scatter = statistics.scatter
    if kind != statistics.covariance:
        scatter = scatter.sum(0) if kind == "tied" else scatter.diagonal(dim1=-2, dim2=-1)
    if not is_shrunk or kind == "tied":
        _warn_rank(kind, count, D, present)

    within_freedom = total - len(present)
    places = [0] if kind == "tied" else present

    def class_covariance(i: int) -> Tensor:
        return scatter / within_freedom if kind == "tied" else scatter[places[i]] / (count[places[i]] - 1)

    number = len(places)
    variance = _variances(scatter, kind).sum() / within_freedom / D
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
        towards = shrinkage_target(scatter.sum(0) / within_freedom, regularization.target) * shrinkage
    elif is_shrunk:
        intensities = [oas_intensity(class_covariance(i), float(count[c] - 1)) for i, c in enumerate(places)]
        shrinkage = float(torch.stack(intensities).mean())
        ridge, place = shrinkage * float(variance), TARGETS.index("identity")
    else:
        ridge = background_ridge = float(regularization)

    whitening = scatter.new_zeros((1 if kind == "tied" else C, *spread.shape))
    log_det = scatter.new_zeros(len(whitening))
    for i, c in enumerate(places):
        matrix = class_covariance(i).mul_(1 - shrinkage)
        if towards is not None:
            matrix += towards
        name = "the tied covariance" if kind == "tied" else f"the covariance of class {c}"
        whitening[c], log_det[c] = whiten(add_ridge(matrix, ridge), name, regularization)
    background, _ = whiten(add_ridge(spread, background_ridge), "the background covariance", regularization)
    log_prior = (count / total).log() if priors == "empirical" else torch.full_like(count, -math.log(len(present)))
    mean = statistics.mean.clone()
    if len(present) < C:
        mean[absent], log_prior[absent] = center, -math.inf
    return GaussianFit(
        mean=mean,
        whitening=whitening,
        log_det=log_det.expand(C).clone(),
        log_prior=log_prior,
        background_mean=center,
        background_whitening=background[None],
        shrinkage=count.new_tensor(shrinkage),
        target=count.new_tensor(place),
        ridge=count.new_tensor(ridge),
    )


def background_moments(statistics: ClassMoments) -> tuple[Tensor, Tensor]:
    """Mean [D] and scatter [D, D] ([D] for "diagonal") of all rows, regardless of class."""
    count, mean = statistics.count, statistics.mean
    center = (count[:, None] * mean).sum(0) / count.sum()
    spread = (mean - center) * count.sqrt()[:, None]
    if statistics.covariance == "diagonal":
        return center, statistics.scatter.sum(0) + spread.square().sum(0)
    within = statistics.scatter if statistics.covariance == "tied" else statistics.scatter.sum(0)
    return center, within + spread.T @ spread


def check_regularization(value: object) -> None:
    """Refuse an unknown regularisation.

    Raises:
        InputError: The value is neither a known name nor a finite number of at least 0.
    """
    if value in ("held_out", "oas", "ddu"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(
            f"`regularization` must be 'held_out', 'oas', 'ddu' or a finite number of at least 0, but it is {value!r}."
        )


def _warn_rank(kind: Covariance, count: Tensor, D: int, present: list[int]) -> None:
    if kind == "tied" and int(count.sum()) - len(present) < D:
        warnings.warn(
            f"The tied covariance of {D} features was estimated from {int(count.sum())} rows of {len(present)} classes and "
            'is rank-deficient, so its regularisation dominates the distances. Use covariance="diagonal", or full '
            'covariances with regularization="oas".',
            stacklevel=3,
        )
    elif kind == "full" and bool((count[present] <= D).any()):
        c = present[int(count[present].argmin())]
        warnings.warn(
            f"Class {c} has {int(count[c])} rows for {D} features, so its covariance is rank-deficient, and the regularisation "
            'dominates the densities. Use regularization="oas" or covariance="tied".',
            stacklevel=3,
        )


def _variances(scatter: Tensor, kind: Covariance) -> Tensor:
    """The diagonals of a scatter."""
    return scatter if kind == "diagonal" else scatter.diagonal(dim1=-2, dim2=-1)
