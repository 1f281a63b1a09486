"""The original's schedule of jitters, written anew from its description, and what its fit costs beside ours.

It tries 310 jitters, from 0 over 1e-308 to 0.1, and factors every class at each (Mukhoti et al., CVPR 2023).
"""

import time
import warnings

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lightning_uq.networks.density import GaussianDensity


def rows(number: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around class means, in float32 as a network gives them."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(number) % classes
    return centers[labels] + torch.randn(number, features, generator=generator), labels


def original_schedule(x: Tensor, y: Tensor, classes: int) -> tuple[MultivariateNormal, float, int]:
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    centered = [x[y == c] - means[c] for c in range(classes)]
    covariances = torch.stack([part.T @ part / (len(part) - 1) for part in centered])
    jitters = [0, torch.finfo(torch.double).tiny, *(10**exponent for exponent in range(-308, 0))]
    for attempt, jitter in enumerate(jitters, 1):
        ridge = jitter * torch.eye(x.shape[1]).unsqueeze(0)  # float32: most of these are zero
        try:
            return MultivariateNormal(means, covariances + ridge, validate_args=False), jitter, attempt
        except torch.linalg.LinAlgError:
            continue
    raise RuntimeError("No jitter made every covariance positive definite.")


def speedups(number: int = 2000, features: int = 256, classes: int = 10) -> dict[str, float]:
    """How many times longer the original's fit takes than ours, the best of three, by our regularisation."""
    x, y = rows(number, features, classes)
    original = cpu_seconds(lambda: original_schedule(x, y, classes), 1)
    kinds = ("ddu", "oas")
    return {
        kind: original / cpu_seconds(lambda k=kind: GaussianDensity.fit_features(x, y, regularization=k), 3)
        for kind in kinds
    }


def cpu_seconds(call, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        best = min(best, time.process_time() - began)
    return best
