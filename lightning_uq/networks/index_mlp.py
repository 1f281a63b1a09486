"""An MLP whose hidden layers all take the index in addition to their input."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.softplus import inverse_softplus_exp
from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.indexers import GaussianWithUnitIndexer
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP, check_sizes
from lightning_uq.networks.priors.additive import AdditivePrior
from lightning_uq.networks.priors.index_priors import EpistemicNetworkWithPrior
from lightning_uq.networks.priors.random_features import Gamma, NullFunction, RandomFeatureGP
from lightning_uq.networks.wrapped import check_vectors, read_both


class IndexMLP(EpistemicNetwork):
    """A ReLU MLP whose hidden layers all take [h, z]; for regression, it also learns a variance.

    The output layer takes only the last hidden layer. The log-variance comes from a small MLP over the input of the last
    hidden layer and a projection of x, so with at most one hidden layer it does not depend on z.

    Args:
        in_features: Size of the flattened input.
        out_features: Classes C, or target dimensions D.
        index_dim: Dimension of z = (1, N(0, I) / sqrt(index_dim - 1)), at least 2.
        hidden_sizes: Widths of the hidden layers.
        variance_dim: Width of the log-variance's projection and hidden layer.
        heads: ``"gaussian"`` for a regression network with outputs [Z, B, 2 D], means and raw variances; None for logits
            [Z, B, C], without the log-variance.

    Raises:
        InputError: A size is below 1, or ``heads`` is unknown.

    Source: ``IndexMLPEnn`` of google-deepmind/enn, which also computes the log-variance for classifiers, but never uses it.

    Example:
        >>> network = IndexMLP(4, 3, index_dim=5)
        >>> network(torch.zeros(6, 4), network.sample_index(7)).shape
        torch.Size([7, 6, 3])
        >>> IndexMLP(4, 1, index_dim=5, heads="gaussian")(torch.zeros(6, 4), network.sample_index(7)).shape
        torch.Size([7, 6, 2])
    """

    indexer: GaussianWithUnitIndexer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        index_dim: int = 8,
        hidden_sizes: Sequence[int] = (50, 50),
        variance_dim: int = 20,
        heads: Literal["gaussian"] | None = None,
    ) -> None:
        super().__init__(GaussianWithUnitIndexer(index_dim))
        check_sizes(in_features=in_features, out_features=out_features, hidden_sizes=hidden_sizes)
        if heads not in ("gaussian", None):
            raise InputError(f"`heads` must be 'gaussian' or None, but it is {heads!r}.")
        self.heads = heads
        widths = [in_features, *hidden_sizes]
        self.hidden = nn.ModuleList(nn.Linear(a + index_dim, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(widths[-1], out_features)
        if heads is not None:
            check_integer("variance_dim", variance_dim, 1)
            self.projection = nn.Linear(in_features, variance_dim)
            read = widths[-2] if hidden_sizes else in_features
            self.log_variance = MLP(read + variance_dim, out_features, hidden_sizes=(variance_dim,))
        truncated_normal_init_(self)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Logits [Z, B, C], or means and raw variances [Z, B, 2 D], of x [B, ...] for ``index`` [Z, index_dim]."""
        mean, log_variance = self.mean_and_log_variance(x, index)
        if log_variance is None:
            return mean
        return torch.cat([mean, inverse_softplus_exp(log_variance)], -1)

    def mean_and_log_variance(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output [Z, B, C] and log-variance of the same shape; None without the gaussian heads."""
        check_vectors(index, self.indexer.index_dim)
        x, index = x.flatten(1).to(self.last.weight.dtype), index.to(self.last.weight)
        h = before = x.unsqueeze(0)
        for layer in self.hidden:
            before = h
            h = read_both(layer, h, index).relu()
        mean = self.last(h)
        mean = mean.expand(len(index), *mean.shape[1:])
        if self.heads is None:
            return mean, None
        projection = self.projection(x).relu().expand(*before.shape[:-1], -1)
        log_variance: Tensor = self.log_variance(torch.cat([before, projection], -1))
        return mean, log_variance.expand_as(mean)


def index_mlp_with_gp_prior(
    in_features: int,
    out_features: int,
    *,
    num_priors: int = 8,
    hidden_sizes: Sequence[int] = (50, 50),
    num_features: int = 100,
    gamma: Gamma = 1.0,
    prior_scale: float = 1.0,
    variance_dim: int = 20,
    heads: Literal["gaussian"] | None = None,
    seed: int | None = None,
) -> EpistemicNetworkWithPrior:
    """An :class:`IndexMLP` with an additive random-feature Gaussian-process prior: sum_k z_k g_k(x), k = 1, ..., K.

    The first entry of z, the constant 1, has no prior. In a regression network, the prior only shifts the means.

    Args:
        in_features: Size of the flattened input.
        out_features: Classes C, or target dimensions D.
        num_priors: K; the index has K + 1 entries.
        hidden_sizes: Widths of the hidden layers.
        num_features: Number of random features of each g_k.
        gamma: Inverse length scale of the g_k, or a range to draw it from.
        prior_scale: Factor of the prior.
        variance_dim: See :class:`IndexMLP`.
        heads: See :class:`IndexMLP`.
        seed: Seed of the priors; None uses the global generator.

    Source: ``IndexMLPWithGpPrior`` of google-deepmind/enn.

    Example:
        >>> network = index_mlp_with_gp_prior(4, 3, num_priors=5)
        >>> network(torch.zeros(6, 4), network.sample_index(7)).shape
        torch.Size([7, 6, 3])
    """
    network = IndexMLP(
        in_features,
        out_features,
        index_dim=num_priors + 1,
        hidden_sizes=hidden_sizes,
        variance_dim=variance_dim,
        heads=heads,
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    functions = [
        RandomFeatureGP(in_features, out_features, num_features=num_features, gamma=gamma, generator=generator)
        for _ in range(num_priors)
    ]
    prior = AdditivePrior([NullFunction(out_features), *functions])
    return EpistemicNetworkWithPrior(network, prior, scale=prior_scale, moves="output" if heads is None else "mean")
