"""The intensity and the target for shrinking the covariances of classes, chosen by the likelihood of held-out rows."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_uq.functional.whitening import variances

Target = Literal["identity", "diagonal", "tied"]
TARGETS: tuple[Target, ...] = ("identity", "diagonal", "tied")

FLOOR = 1e-6
"""Added to every variance, relative to their mean: enough for a Cholesky factor, but too little to matter."""


class Shrinkage(NamedTuple):
    """Every covariance S_c becomes (1 - r) S_c + r T + e I, with e = 1e-6 tr(W) / D.

    Attributes:
        intensity: r in [0, 1].
        target: How T is computed from the pooled within-class covariance W: ``"identity"``: (tr W / D) I; ``"diagonal"``: the diagonal
            of W; ``"tied"``: W itself.
    """

    intensity: float
    target: Target


class Moments(Protocol):
    """Sufficient statistics of rows of classes."""

    @property
    def count(self) -> Tensor:
        """Number of rows of each class, [C]."""

    @property
    def mean(self) -> Tensor:
        """Mean of each class, [C, D]."""

    @property
    def scatter(self) -> Tensor:
        """Sums of squares about the class means: [C, D, D], or their diagonals [C, D]."""


def shrinkage_target(within: Tensor, target: Target) -> Tensor:
    """The target T [D, D] from the pooled within-class covariance W [D, D]; [D] from its diagonal [D].

    Example:
        >>> shrinkage_target(torch.tensor([[1.0, 0.5], [0.5, 3.0]]), "identity")
        tensor([[2., 0.],
                [0., 2.]])
    """
    if target == "tied" or (target == "diagonal" and within.ndim == 1):
        return within
    diagonal = variances(within)
    diagonal = diagonal if target == "diagonal" else diagonal.mean().expand_as(diagonal)
    return diagonal if within.ndim == 1 else torch.diag(diagonal)


def held_out_shrinkage(first: Moments, second: Moments) -> Shrinkage | None:
    """The shrinkage for which a fit to each half of the rows gives the other half the highest likelihood.

    One r and one T apply to all classes, since log-determinants with different regularisation are not comparable, and classes have
    equal weights, as in a density with uniform priors. With S_c and W of one half, and M_c the mean square of the other half's rows about
    the first half's mean, the mean held-out log-likelihood of a class is, up to a constant,

        -1/2 (log |Sigma_c| + tr(Sigma_c^-1 M_c)),    Sigma_c = (1 - r) S_c + r T,

    which does not need the rows again. e I is added to S, T and M, so that a feature that is constant over all rows favours no r. The
    targets are compared in the order of their number of parameters: a later one is chosen if its gain, over classes and halves, exceeds
    its standard error. (A tied target is not chosen because a few small classes gain while others lose.) If r is best for half of the
    rows, the target counts as nu rows with r = nu / (nu + n / 2); for all rows it is nu / (nu + n) = r / (2 - r).

    Args:
        first: Statistics of one half of the rows.
        second: Statistics of the other half, with the same classes.

    Returns:
        The shrinkage; None if no class has two rows in one half and one in the other, or if all features are constant.

    Example:
        >>> from lightning_uq.networks.class_statistics import ClassStatistics
        >>> halves = ClassStatistics(2, 3), ClassStatistics(2, 3)
        >>> for seed, half in enumerate(halves):
        ...     x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ...     half.update(x * torch.tensor([0.1, 1.0, 9.0]), torch.arange(8) % 2)
        >>> held_out_shrinkage(*halves).target  # the two classes have one covariance, far from a multiple of the identity
        'diagonal'
    """
    grid, step = (
        torch.arange(-16, 16.25, 0.25, dtype=torch.float64),
        torch.arange(-0.25, 0.26, 0.01, dtype=torch.float64),
    )
    best: tuple[Tensor, Tensor, Target] | None = None
    for target in TARGETS if first.scatter.ndim == 3 else TARGETS[:2]:  # for variances, "tied" equals "diagonal"
        classes = [*_classes(first, second, target), *_classes(second, first, target)]
        if classes:
            values, logit = _maximum(classes, grid)
            values, logit = _maximum(classes, logit + step)
            if best is None or _exceeds(values, best[0]):
                best = values, logit, target
    if best is None:
        return None
    r = float(torch.sigmoid(best[1]))
    return Shrinkage(r / (2 - r), best[2])


class _Class(NamedTuple):
    """A class of one half, in the basis in which S and M are diagonal and T is the identity."""

    log_det: Tensor
    spectrum: Tensor
    squares: Tensor


def _maximum(classes: list[_Class], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The classes' held-out log-likelihoods at the r with the largest mean, among those with these logits; and that logit."""
    r = torch.sigmoid(logits)[:, None]
    values = []
    for one in classes:
        mixed = (1 - r) * one.spectrum + r
        values.append(-0.5 * (one.log_det + (mixed.log() + one.squares / mixed).sum(1)))
    found = torch.stack(values, 1)
    best = found.mean(1).argmax()
    return found[best], logits[best]


def _exceeds(values: Tensor, others: Tensor) -> bool:
    """Whether the mean gain of some values over those of the same classes exceeds its standard error."""
    gain = values - others
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > error)


def _classes(fitted: Moments, held_out: Moments, target: Target) -> list[_Class]:
    """The classes with enough rows to be fitted in one half and scored in the other."""
    usable = ((fitted.count >= 2) & (held_out.count >= 1)).nonzero().flatten().tolist()
    if not usable:
        return []
    within = fitted.scatter[usable].sum(0) / (fitted.count[usable] - 1).sum()
    floor = FLOOR * float(variances(within).mean())
    if not floor > 0:
        return []
    T = _with_floor(shrinkage_target(within, target), floor)
    factor = T.sqrt() if T.ndim == 1 else torch.linalg.cholesky(T)
    log_det = 2 * (factor if T.ndim == 1 else factor.diagonal()).log().sum()
    found = []
    for c in usable:
        step = held_out.mean[c] - fitted.mean[c]
        outer = step.square() if T.ndim == 1 else torch.outer(step, step)
        S = _with_floor(fitted.scatter[c] / (fitted.count[c] - 1), floor)
        M = _with_floor(held_out.scatter[c] / held_out.count[c] + outer, floor)
        found.append(_Class(log_det, *_in_common_basis(factor, S, M)))
    return found


def _with_floor(covariance: Tensor, floor: float) -> Tensor:
    covariance = covariance.clone()
    variances(covariance).add_(floor)
    return covariance


def _in_common_basis(factor: Tensor, S: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [D] of S whitened by the target's factor, and the mean squares [D] of M along its eigenvectors."""
    if factor.ndim == 1:
        return S / factor.square(), M / factor.square()
    half = torch.linalg.solve_triangular(factor, S, upper=False)
    spectrum, basis = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    axes = torch.linalg.solve_triangular(factor.mT, basis, upper=True)  # L^-T Q
    return spectrum.clamp_min(torch.finfo(S.dtype).tiny), (axes * (M @ axes)).sum(0)
