r"""The Laplace approximation of a network's last linear layer: a Gaussian over its weights, from sums over the training data.

Row ``n`` has features phi_n [P]: the layer's input, and 1 for its bias. The Gauss-Newton matrix of the layer's weights W [O, P] has one
of two forms. Both are stored as eigenvalues and eigenvectors, so that each prior precision costs only one division:

- independent outputs: sum_n w_no phi_n phi_n^T for each output o, where w is the curvature of the loss (1 / noise variance, p (1 - p));
- a softmax: the Kronecker product of mean_n (diag p_n - p_n p_n^T) with sum_n phi_n phi_n^T.

Source: MacKay, Neural Computation 4 (1992); Daxberger et al., NeurIPS 2021 (arXiv 2106.14806); for the Kronecker product Ritter et al.,
ICLR 2018.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LastLayerPosterior(NamedTuple):
    """A Gaussian over the weights [O, P] of a linear layer, with the trained weights as its mean.

    In direction r of the outputs and j of the features, the precision is ``curvature[r] * eigenvalues[., j] + prior_precision[r]``.

    Attributes:
        mean: The trained weights [O, P].
        eigenvalues: Eigenvalues of the features' second moments [K, P]; K is 1, or R if each direction has its own.
        eigenvectors: Their eigenvectors in columns [K, P, P].
        curvature: Curvature of the loss along the R directions of the outputs [R].
        basis: These directions as columns [O, R]; the identity for independent outputs.
        prior_precision: Precision of the weights' prior along each direction [R].
        noise: Noise variance of each output [O], if the network does not predict it; otherwise 0.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    curvature: Tensor
    basis: Tensor
    prior_precision: Tensor
    noise: Tensor

    @property
    def precision(self) -> Tensor:
        """The precision of each direction [R, P]."""
        return self.curvature[:, None] * self.eigenvalues + self.prior_precision[:, None]


def with_bias(features: Tensor) -> Tensor:
    """Features [..., D] with a 1 appended: [..., D + 1].

    Example:
        >>> with_bias(torch.zeros(1, 2))
        tensor([[0., 0., 1.]])
    """
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def eigen(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative eigenvalues [K, P] and eigenvectors [K, P, P] of second moments [K, P, P].

    The largest entry of each eigenvector is positive, so that linear algebra libraries agree on its sign.

    Example:
        >>> eigen(torch.diag(torch.tensor([1.0, 4.0]))[None])[0]
        tensor([[1., 4.]])
    """
    values, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    return values.clamp_min(0.0), _with_signs(vectors)


def _with_signs(vectors: Tensor) -> Tensor:
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def softmax_directions(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [C - 1] and eigenvectors [C, C - 1] of a softmax's curvature [C, C], without the direction that has no effect.

    Adding a number to all logits does not change the probabilities, so (1, ..., 1) has neither curvature nor uncertainty.

    Example:
        >>> values, vectors = softmax_directions(torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))
        >>> values, vectors.abs()
        (tensor([0.5000]), tensor([[0.7071],
                [0.7071]]))
    """
    C = len(curvature)
    lifted = (
        curvature + curvature.mT
    ) / 2 + 2 / C  # moves the flat direction to 2, above all others, which are at most 1 / 2
    values, vectors = torch.linalg.eigh(lifted)
    return values[:-1].clamp_min(0.0), _with_signs(vectors[:, :-1])


def output_variance(posterior: LastLayerPosterior, features: Tensor) -> Tensor:
    """Variance [B, O] of the outputs under the posterior, for features [B, P].

    Example:
        >>> one = torch.ones(1, 1)
        >>> posterior = LastLayerPosterior(one, 3 * one, one[None], one[0], one, one[0], one[0])
        >>> output_variance(posterior, torch.tensor([[2.0]]))  # 2^2 / (1 * 3 + 1)
        tensor([[1.]])
    """
    return direction_variance(posterior, features) @ posterior.basis.square().T


def direction_variance(posterior: LastLayerPosterior, features: Tensor) -> Tensor:
    """Variance [B, R] along the directions of the outputs, for features [B, P]."""
    squares = projected(posterior.eigenvectors, features).square()
    return torch.einsum("kbp,rp->br" if len(squares) == 1 else "rbp,rp->br", squares, 1 / posterior.precision)


def projected(eigenvectors: Tensor, features: Tensor) -> Tensor:
    """Features [B, P] in the bases [K, P, P]: [K, B, P]."""
    return features @ eigenvectors


def weight_samples(posterior: LastLayerPosterior, noise: Tensor) -> Tensor:
    """Deviations [Z, O, P] of the weights from the trained ones, from standard normal ``noise`` [Z, O, P].

    They are the noise times the symmetric square root of the covariance, which does not depend on the choice of eigenvectors.

    Example:
        >>> one = torch.ones(1, 1)
        >>> posterior = LastLayerPosterior(one, 3 * one, one[None], one[0], one, one[0], one[0])
        >>> weight_samples(posterior, torch.ones(1, 1, 1))
        tensor([[[0.5000]]])
    """
    along = (posterior.basis.T @ noise).unsqueeze(2) @ posterior.eigenvectors  # [Z, R, 1, P]
    scaled = along * posterior.precision.rsqrt().unsqueeze(1)
    return posterior.basis @ (scaled @ posterior.eigenvectors.mT).squeeze(2)


# ---------------------------------------------------------------------- prior precision and noise variance


def candidates(largest: Tensor, per_decade: int = 4) -> Tensor:
    """Candidate prior precisions [G]: 10^-12 to 10^4 times the largest curvature of the data.

    Example:
        >>> candidates(torch.tensor(2.0), 1)[[0, -1]]
        tensor([2.0000e-12, 2.0000e+04])
    """
    powers = largest.new_tensor([10 ** (step / per_decade) for step in range(-12 * per_decade, 4 * per_decade + 1)])
    return largest.clamp_min(torch.finfo(largest.dtype).tiny ** 0.25) * powers


def log_evidence_terms(posterior: LastLayerPosterior) -> Tensor:
    """The terms of the log marginal likelihood from prior and posterior, for each direction [R].

    They are P/2 log lambda - lambda/2 |w|^2 - 1/2 log det(posterior precision). The remaining term is the log-likelihood of the trained weights.

    Example:
        >>> one = torch.ones(1, 1)
        >>> posterior = LastLayerPosterior(2 * one, 0 * one, one[None], one[0], one, one[0], one[0])  # without data: only the prior
        >>> log_evidence_terms(posterior)
        tensor([-2.])
    """
    squared = (posterior.basis.T @ posterior.mean).square().sum(1)
    precision = posterior.prior_precision
    occam = posterior.mean.shape[1] * precision.log() - posterior.precision.log().sum(1)
    return 0.5 * (occam - precision * squared)


def with_precision(posterior: LastLayerPosterior, precision: Tensor) -> LastLayerPosterior:
    """The posterior with another prior precision: a scalar for all directions, or one per direction [R]."""
    return posterior._replace(prior_precision=precision.expand(len(posterior.curvature)).clone())


def marginal_precision(posterior: LastLayerPosterior, *, shared: bool) -> LastLayerPosterior:
    """The posterior with the prior precision among :func:`candidates` that has the largest marginal likelihood.

    Args:
        posterior: The posterior; its own ``prior_precision`` is ignored.
        shared: Whether all directions share one precision.
    """
    options = precision_candidates(posterior)
    terms = torch.stack([log_evidence_terms(with_precision(posterior, one)) for one in options])
    return with_precision(posterior, options[terms.sum(1).argmax() if shared else terms.argmax(0)])


def precision_candidates(posterior: LastLayerPosterior, per_decade: int = 4) -> Tensor:
    """The :func:`candidates` [G] of a posterior's prior precision."""
    return candidates((posterior.curvature[:, None] * posterior.eigenvalues).amax(), per_decade)


def marginal_noise(
    eigenvalues: Tensor, squared_error: Tensor, squared_weight: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The noise variance and the prior precision [O] with the largest marginal likelihood, for outputs that are means.

    With alpha = prior precision times noise variance s^2, the best s^2 = (SSE + alpha |w|^2) / N has a closed form, and the rest depends only
    on alpha: -N/2 log s^2 + P/2 log alpha - 1/2 sum_j log(e_j + alpha).

    Args:
        eigenvalues: Eigenvalues of the features' second moments [O, P].
        squared_error: Sums of squared residuals [O].
        squared_weight: Squared norms of the weights [O].
        count: Number of rows [O].

    Example:
        >>> noise, precision = marginal_noise(*(torch.tensor(x, dtype=torch.float64) for x in ([[100.0]], [50.0], [1.0], [100.0])))
        >>> noise.round(decimals=2)
        tensor([0.5100], dtype=torch.float64)
    """
    alpha = candidates(eigenvalues.amax())[:, None]  # [G, 1]
    noise = positive((squared_error + alpha * squared_weight) / count)
    occam = eigenvalues.shape[1] * alpha.log() - (eigenvalues + alpha[:, None]).log().sum(2)
    best = (occam - count * noise.log()).argmax(0, keepdim=True)
    noise = noise.gather(0, best)[0]
    return noise, alpha[:, 0][best[0]] / noise


def held_out_noise(scaled_error: Tensor, log_spread: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The noise variance [O] and the index of one of G candidates [O] that give held-out rows the largest likelihood.

    With alpha, the variance of row n is s^2 (1 + q_n), where q_n = phi_n^T (sum phi phi^T + alpha I)^-1 phi_n, so the best
    s^2 = mean_n r_n^2 / (1 + q_n) has a closed form.

    Args:
        scaled_error: sum_n r_n^2 / (1 + q_n) of residuals r, [G, O].
        log_spread: sum_n log(1 + q_n), [G, O].
        count: Number of rows [O].

    Example:
        >>> held_out_noise(torch.tensor([[8.0], [8.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([4.0]))
        (tensor([2.]), tensor([1]))
    """
    noise = positive(scaled_error / count)
    best = (count * noise.log() + log_spread).argmin(0)
    return noise.gather(0, best[None])[0], best


def positive(variance: Tensor) -> Tensor:
    """A variance with a positive lower bound, because all residuals may be 0."""
    return variance.clamp_min(torch.finfo(variance.dtype).tiny ** 0.5)


def probit_scale(variance: Tensor) -> Tensor:
    """MacKay's factor for a logit with this variance: 1 / sqrt(1 + pi / 8 v).

    Example:
        >>> probit_scale(torch.tensor([0.0, 24 / math.pi]))
        tensor([1.0000, 0.5000])
    """
    return (1 + math.pi / 8 * variance).rsqrt()
