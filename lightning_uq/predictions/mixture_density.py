"""The prediction of a mixture density network."""

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import mixture
from lightning_uq.functional.components import Components
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.targets import sum_over_targets
from lightning_uq.functional.validation import check_open_unit
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction
from lightning_uq.predictions.spread import variance_over


class MixtureDensityPrediction(NumberPrediction):
    """A regressor's prediction: a mixture of K weighted Gaussians per target and hypothesis.

    Several hypotheses form an equal-weight mixture of their mixtures. The D dimensions are independent given the hypothesis.

    Args:
        member_logits: Logits of the components' weights [Z, B, D, K], or [Z, B, H, D, K] over a horizon; Z = 1 for one network.
        member_mean: Means of the components, of the same shape.
        member_variance: Variances of the components, of the same shape, positive.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes differ or have fewer than four axes.

    Source: Bishop, "Mixture density networks", NCRG/94/004 (1994).

    Example:
        >>> means = torch.tensor([[[[-1.0, 1.0]]]])  # Z, B, D, K = 1, 1, 1, 2
        >>> prediction = MixtureDensityPrediction(torch.zeros(1, 1, 1, 2), means, torch.ones(1, 1, 1, 2))
        >>> prediction.mean, prediction.variance
        (tensor([[0.]]), tensor([[2.]]))
    """

    member_logits = Field("Logits of the components' weights [Z, B, D, K].", batch_axis=1)
    member_mean = Field("Means of the components [Z, B, D, K].", batch_axis=1, unit="location")
    member_variance = Field("Variances of the components [Z, B, D, K].", batch_axis=1, unit="variance")

    def _check(self) -> None:
        self._check_shapes("[Z, B, D, K]", "member_logits", "member_mean", "member_variance")
        super()._check()

    def _check_values(self) -> None:
        if not bool((self.member_variance > 0).all()):
            raise InputError("`member_variance` must be positive, but some of its values are not.")

    @property
    def num_indices(self) -> int:
        """Z, the number of hypotheses."""
        return len(self.member_mean)

    @property
    def target_shape(self) -> torch.Size:
        """The shape [B, ..., D] of the targets."""
        return self.member_mean.shape[1:-1]

    @property
    def weights(self) -> Tensor:
        """Weights of the components [Z, B, D, K], which sum to 1 over K."""
        return upcast(self.member_logits).softmax(-1)

    @property
    def _means(self) -> Tensor:
        """The hypotheses' means [Z, B, D]."""
        return (self.weights * upcast(self.member_mean)).sum(-1)

    @property
    def mean(self) -> Tensor:
        """E[y] [B, D]."""
        return self._means.mean(0)

    @property
    def aleatoric_variance(self) -> Tensor:
        """Mean over the hypotheses of the variance of their mixtures [B, D]."""
        distance, weights = upcast(self.member_mean) - self._means.unsqueeze(-1), self.weights
        spread = weights * (upcast(self.member_variance) + distance.square())
        return torch.where(weights > 0, spread, 0).sum(-1).mean(0)  # a component of weight 0 may lie at infinity

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over the hypotheses of their means [B, D]."""
        return variance_over(self._means)

    def log_prob(self, target: Tensor) -> Tensor:
        """log mean_z prod_d sum_k w_zdk N(target_d; mu_zdk, sigma_zdk^2) over the known targets: [B] for ``target`` [B, D]."""
        value, known = self._checked_known(target)
        log_weights = upcast(self.member_logits).log_softmax(-1)
        components = mixture.gaussian_log_prob(self.member_mean, self.member_variance, value.unsqueeze(-1))
        members = sum_over_targets(torch.logsumexp(log_weights + components, -1), known)
        return torch.logsumexp(members, 0) - math.log(len(members))

    def components(self) -> Components:
        """The components of all hypotheses [Z K, B, D]."""
        mean, variance, weights = self._components
        return Components(mean, variance.sqrt(), weights.log())

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the marginals at a ``level`` in (0, 1)."""
        check_open_unit("level", level)
        return self.quantiles_at(level)

    def quantiles_at(self, level: float | Tensor) -> Tensor:
        """Quantiles [B, D] at one level per target; ``level`` broadcasts to the targets."""
        mean, variance, weights = self._components
        return mixture.mixture_quantile(mean, variance, level, weights)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the marginals."""
        mean, variance, weights = self._components
        return mixture.mixture_cdf(mean, variance, self._checked(target), weights)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the marginals, in the target's units; lower is better."""
        mean, variance, weights = self._components
        return mixture.mixture_crps(mean, variance, self._checked(target), weights)

    @property
    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and weights [Z K, B, D] of all components of all hypotheses."""
        each = self.member_mean, self.member_variance, self.weights / self.num_indices
        mean, variance, weights = (upcast(tensor).movedim(-1, 1).flatten(0, 1) for tensor in each)
        return mean, variance, weights
