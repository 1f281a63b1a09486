"""Cholesky factors of covariances, their inverses, and the jitter that they need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_uq.errors import InputError

# In its float32 identity, the original's values, 0 and 10^-308 to 10^-1, round to these distinct values.
_DECADES = torch.tensor([10.0**exponent for exponent in range(-45, 0)], dtype=torch.float64)

DDU_JITTERS: tuple[float, ...] = (0.0, *_DECADES.float().tolist())


def variances(covariance: Tensor) -> Tensor:
    """The diagonal [D] of a covariance [D, D] as a view, or the variances [D] themselves."""
    return covariance if covariance.ndim == 1 else covariance.diagonal()


def cholesky(covariance: Tensor) -> Tensor | None:
    """The Cholesky factor [D, D], or the standard deviations [D]; None if the covariance is not positive definite."""
    if covariance.ndim == 1:
        return covariance.sqrt() if bool((covariance > 0).all()) else None
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor if int(info) == 0 and bool(factor.diagonal().isfinite().all()) else None


def whiten(covariance: Tensor, name: str, regularization: object) -> tuple[Tensor, Tensor]:
    """The inverse factor and the log-determinant."""
    factor = cholesky(covariance)
    if factor is None:
        constant = bool((variances(covariance) <= 0).all())
        reason = "all features are constant" if constant else "features are constant or linearly dependent"
        raise InputError(
            f"With regularization={regularization!r} {name} is not positive definite: {reason}. "
            'Use regularization="oas", or a larger float.'
        )
    if covariance.ndim == 1:
        return factor.reciprocal(), 2 * factor.log().sum()
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False), 2 * factor.diagonal().log().sum()


def add_ridge(covariance: Tensor, ridge: float) -> Tensor:
    """Add to the variances of a covariance [D, D] or [D], in place."""
    variances(covariance).add_(ridge)
    return covariance


def ddu_jitter(covariance_of: Callable[[int], Tensor], number: int, at_least: float = 0.0) -> float:
    """The smallest jitter with which all covariances have Cholesky factors; attempts with the same outcome are skipped."""
    jitters = [jitter for jitter in DDU_JITTERS if jitter >= at_least]
    position, agreed, c = 0, 0, 0
    # Because of rounding, a larger jitter can fail again: if one class needs more, all others are tried anew.
    while agreed < number:
        covariance = covariance_of(c)
        diagonal = variances(covariance).clone()
        tried = None
        while True:
            if position == len(jitters):
                raise InputError(
                    f"The covariance of class {c} is not positive definite with any jitter of "
                    'regularization="ddu", up to 0.1. Use regularization="oas".'
                )
            raised = diagonal + jitters[position]
            if tried is None or not torch.equal(raised, tried):
                tried = raised
                variances(covariance).copy_(raised)
                if cholesky(covariance) is not None:
                    break
                agreed = 0
            position += 1
        agreed, c = agreed + 1, (c + 1) % number
    return jitters[position]
