"""The feature density beside the original's schedule, and its scores beside a triangular solve."""

import math
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.harness import Call, Contender, Work
from lightning_uq.networks.density import GaussianDensity

TITLE = "Feature density"
ABOUT = """Ten classes. The fit is of a rank-deficient density, N = 2,000 and D = 256. The original (Mukhoti et al., CVPR 2023) tries 310 jitters, from 0 over 1e-308 to 0.1, and
factors every class at each; that loop is written anew here from its description. `"ddu"` ends at the same jitter, `"oas"` needs none. Scores are of 10,000 rows, D = 256."""

CLASSES, D = 10, 256


def works(device: str) -> Iterator[Work]:
    """The fit and the score."""
    x, y = rows(2000, device)
    fits = [
        Contender("lightning-uq, ddu", partial(fit, x, y, "ddu")),
        Contender("lightning-uq, oas", partial(fit, x, y, "oas"), agrees=False),
        Contender("original's schedule", lambda: partial(original_schedule, x, y)),
    ]
    yield Work("fit", fits, rtol=1e-2, calls=1)
    density, single = (
        GaussianDensity.fit_features(*rows(20 * D, device), dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    test, _ = rows(10_000, device, seed=2)
    scores = [
        Contender("lightning-uq, float64", lambda: partial(density.log_density, test)),
        Contender("lightning-uq, float32", lambda: partial(single.log_density, test)),
        Contender("triangular solve", lambda: partial(triangular, density, torch.linalg.inv(density.whitening), test)),
    ]
    yield Work("score", scores)


def rows(number: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around class means, in float32 as a network gives them."""
    centers = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(number) % CLASSES
    noise = torch.randn(number, D, generator=torch.Generator().manual_seed(seed))
    return (centers[labels] + noise).to(device), labels.to(device)


def fit(x: Tensor, y: Tensor, regularization: str) -> Call:
    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the missing rank
            density = GaussianDensity.fit_features(x, y, regularization=regularization)
        return density.log_density(x[:100])

    return call


def original_schedule(x: Tensor, y: Tensor) -> Tensor:
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(CLASSES)])
    centered = [x[y == c] - means[c] for c in range(CLASSES)]
    covariances = torch.stack([part.T @ part / (len(part) - 1) for part in centered])
    jitters = [0, torch.finfo(torch.double).tiny, *(10**exponent for exponent in range(-308, 0))]
    for jitter in jitters:
        ridge = jitter * torch.eye(D, device=x.device).unsqueeze(0)  # float32: most of these are zero
        try:
            fitted = MultivariateNormal(means, covariances + ridge, validate_args=False)
        except torch.linalg.LinAlgError:
            continue
        return fitted.log_prob(x[:100].unsqueeze(1)).logsumexp(1) - math.log(CLASSES)
    raise RuntimeError("No jitter made every covariance positive definite.")


def triangular(density: GaussianDensity, factors: Tensor, x: Tensor) -> Tensor:
    columns = []
    for mean, factor, log_det in zip(density.mean, factors, density.log_det, strict=True):
        white = torch.linalg.solve_triangular(factor, (x.double() - mean).T, upper=False)
        columns.append(-0.5 * (white.square().sum(0) + log_det + D * math.log(2 * math.pi)))
    return torch.stack(columns, 1).logsumexp(1) - math.log(CLASSES)
