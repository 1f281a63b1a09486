"""A mixture of Gaussians fitted to features without labels, by expectation maximization."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import Covariance, GaussianFit, PlainMoments, Regularization, fit_gaussian
from lightning_uq.functional.held_out_shrinkage import Shrinkage, held_out_shrinkage
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.networks.density import GaussianDensity

MAX_MIXTURE_ROWS = 2**14
"""The largest number of rows to fit a mixture to. With D = 512 and K = 10, a step over this many takes seconds."""

_MAX_STEPS, _TOLERANCE = 100, 1e-4
_STARTS, _LLOYD_STEPS = 5, 20


def fit_mixture(
    features: Tensor,
    num_components: int,
    covariance: Covariance = "full",
    regularization: Regularization = "held_out",
    seed: int = 0,
) -> GaussianFit:
    """Fit p(f) = sum_k pi_k N(f; mu_k, Sigma_k) by EM. Components take the place of classes.

    The initial components are the clusters of k-means++, the best of five starts on features of unit variance. Every step assigns rows
    to components by their posterior, with the covariances of :func:`~lightning_uq.functional.gaussian.fit_gaussian`. With
    ``"held_out"``, they are first shrunk by oracle intensities, until the steps gain less than 1e-4 nats per row, and from then on by the
    likelihood of held-out halves, chosen once.

    Args:
        features: [N, D].
        num_components: K, at most N / 2.
        covariance: "full", "tied" or "diagonal".
        regularization: "held_out", "oas", "ddu" or a float.
        seed: Seed of the clusters' starts.

    Returns:
        The fit; its log-priors are the components' weights.

    Raises:
        InputError: There are too few features, or a component keeps fewer than two rows.

    Source: Dempster, Laird & Rubin, JRSS B 39 (1977); Arthur & Vassilvitskii, SODA 2007, for the initial components.

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> x[:50] += 9
        >>> fit_mixture(x, 2).log_prior.exp().sort().values.round(decimals=2)
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    check_integer("num_components", num_components, 1)
    check_choice("covariance", covariance, ("full", "tied", "diagonal"))
    if features.ndim != 2 or len(features) < 2 * num_components:
        raise InputError(
            f"`features` must be [N, D] with at least two rows for each of the {num_components} components, but its shape is "
            f"{list(features.shape)}."
        )
    rows = to_float64(features.detach())
    belongs = _first_parts(rows, num_components, seed)
    steady: Regularization | Shrinkage = "oas" if regularization == "held_out" else regularization
    fit, belongs = _repeat(rows, belongs, covariance, steady)
    if regularization == "held_out" and covariance != "tied":
        half = torch.arange(len(rows)) % 2 == 0
        found = held_out_shrinkage(*(_moments(rows[part], belongs[part], covariance) for part in (half, ~half)))
        if found is not None:
            fit, _ = _repeat(rows, belongs, covariance, found)
    return fit


def in_order(features: Tensor) -> Tensor:
    """The rows of features [M, N, D] in an order that depends only on the rows, and not on how they were gathered."""
    D = features.shape[2]
    weights = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(features.device)
    return features[:, (features[0].to(weights.dtype) @ weights).argsort(stable=True)]


def _repeat(
    rows: Tensor, belongs: Tensor, covariance: Covariance, regularization: Regularization | Shrinkage
) -> tuple[GaussianFit, Tensor]:
    """Alternate the M and the E step until a step has no gain."""
    before = -torch.inf
    for _ in range(_MAX_STEPS):
        moments = _moments(rows, belongs, covariance)
        few = (moments.count < 2).nonzero().flatten().tolist()
        if few:
            raise InputError(
                f"Each of the {belongs.shape[1]} components needs at least 2 rows, but one keeps {float(moments.count[few[0]]):.2g}. "
                "Choose a smaller `num_components`."
            )
        fit = fit_gaussian(moments, covariance, "empirical", regularization)
        joint = GaussianDensity(fit).log_prob(rows) + fit.log_prior
        likelihood = torch.logsumexp(joint, 1)
        belongs = (joint - likelihood[:, None]).exp()
        gain, before = float(likelihood.mean()) - before, float(likelihood.mean())
        if gain < _TOLERANCE:
            break
    return fit, belongs


def _moments(rows: Tensor, belongs: Tensor, covariance: Covariance) -> PlainMoments:
    count = belongs.sum(0)
    mean = belongs.T @ rows / count.clamp_min(1e-12)[:, None]
    parts = []
    for k in range(belongs.shape[1]):
        step = rows - mean[k]
        weighted = belongs[:, k, None] * step
        parts.append((weighted * step).sum(0) if covariance == "diagonal" else weighted.T @ step)
    scatter = torch.stack(parts)
    return PlainMoments(covariance, count, mean, scatter.sum(0) if covariance == "tied" else scatter)


def _first_parts(rows: Tensor, num_components: int, seed: int) -> Tensor:
    """The cluster of each row as a one-hot matrix [N, K]: the best of several runs of k-means, on features of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    scaled = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)
    best, lowest = torch.zeros(len(rows), dtype=torch.long, device=rows.device), torch.inf
    for _ in range(_STARTS):
        centers = _spread_rows(scaled, num_components, generator)
        for _ in range(_LLOYD_STEPS):
            distance, nearest = torch.cdist(scaled, centers).min(1)
            count = nearest.bincount(minlength=num_components)
            sums = torch.zeros_like(centers).index_add_(0, nearest, scaled)
            centers = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], centers)
        total = float(distance.square().sum())
        if total < lowest:
            best, lowest = nearest, total
    return torch.nn.functional.one_hot(best, num_components).to(rows.dtype)


def _spread_rows(rows: Tensor, num_components: int, generator: torch.Generator) -> Tensor:
    """K rows for k-means++, each drawn with a probability proportional to its squared distance from the earlier ones."""
    chosen = rows[int(torch.randint(len(rows), (), generator=generator))][None]
    while len(chosen) < num_components:
        weight = torch.cdist(rows, chosen).amin(1).square().cpu() + 1e-12
        chosen = torch.cat([chosen, rows[torch.multinomial(weight, 1, generator=generator)]])
    return chosen
