"""Rows of several classes, and what their statistics are by definition."""

import torch

from lightning_uq.networks.class_statistics import ClassStatistics

KINDS = ["full", "tied", "diagonal"]


def rows(seed, n=60, d=4, c=3, scale=1.0, offset=0.0, dtype=torch.float64):
    """Anisotropic features with at least two rows of every class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(c).repeat(2), torch.randint(c, (n - 2 * c,), generator=generator)])
    centers = 3 * torch.randn(c, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(c, d, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, d, generator=generator, dtype=torch.float64) @ mix[labels]
    return (scale * (centers[labels] + noise.squeeze(1)) + offset).to(dtype), labels


def stream(x, y, kind="full", sizes=None, c=3):
    statistics = ClassStatistics(c, x.shape[1], kind)
    for part, labels in zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True):
        statistics.update(part, labels)
    return statistics


def brute_scatter(x, y, kind, c=3):
    per_class = []
    for k in range(c):
        part = x[y == k].double()
        part = part - part.mean(0)
        per_class.append(part.T @ part)
    full = torch.stack(per_class)
    return {"full": full, "tied": full.sum(0), "diagonal": full.diagonal(dim1=1, dim2=2)}[kind]


def covariance_of(fit):
    """Sigma_c [C or 1, D, D] recomputed from the whitening matrices."""
    if fit.whitening.ndim == 2:
        return torch.diag_embed(fit.whitening.reciprocal().square())
    factor = torch.linalg.inv(fit.whitening)
    return factor @ factor.mT
