"""The Neural Testbed's quality of a joint prediction: its divergence from a known environment.

An environment draws inputs x_1 ... x_tau and their labels, and says how likely they were: log P(y | x, environment). A
model says log of the mean over z of prod_t p_z(y_t | x_t). The mean difference of the two, over many draws, estimates the
Kullback-Leibler divergence of the model's joint prediction from the environment's; it is in nats and not divided by tau.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.likelihood``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional._validation import check_floating, check_integer, check_target, to_sum_dtype

_CLIP = 5.0  # of probits, as in the original
_MAX_PLANES = 16
_CHUNK = 1 << 21  # probits read at a time: 16 MB


class KLEstimate(NamedTuple):
    """An estimated divergence.

    Attributes:
        mean: Its value in nats: a scalar in float64.
        std: Standard deviation over the draws; not finite where one of them is not.
        num_infinite: How many of the draws were infinite; each counted as the largest finite one.
        num_draws: How many draws there were.
    """

    mean: Tensor
    std: Tensor
    num_infinite: int
    num_draws: int


def kl_estimate(true_log_likelihood: Tensor, model_log_likelihood: Tensor) -> KLEstimate:
    """Mean over draws of log P(y | environment) - log P(y | model), as the testbed takes it.

    A draw to which the model gave no probability at all is infinite. The original counts it as the largest finite one, so
    that one such draw does not hide all others; how many there were is told here, and a model with any is worse than its
    mean says. Where no draw is finite the mean is infinite. A NaN stays one.

    Args:
        true_log_likelihood: [S], of the environment.
        model_log_likelihood: [S], of the model (:func:`joint_log_likelihood`).

    Raises:
        InputError: The shapes differ, or there is no draw.

    Source: ``parse_kl_estimates`` of ``neural_testbed.likelihood.utils``.

    Example:
        >>> estimate = kl_estimate(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-0.5, -1.5, -torch.inf]))
        >>> estimate.mean, estimate.num_infinite
        (tensor(0.5000, dtype=torch.float64), 1)
    """
    check_floating("true_log_likelihood", true_log_likelihood, 1, "[S]")
    check_floating("model_log_likelihood", model_log_likelihood, 1, "[S]")
    if true_log_likelihood.shape != model_log_likelihood.shape or true_log_likelihood.numel() == 0:
        raise InputError(
            f"Expected argument `model_log_likelihood` to hold one number for each of the {len(true_log_likelihood)} draws "
            f"(at least one), but got shape {list(model_log_likelihood.shape)}."
        )
    draws = to_sum_dtype(true_log_likelihood) - to_sum_dtype(model_log_likelihood)
    infinite = draws.isposinf()
    largest = draws[draws.isfinite()].max() if bool(draws.isfinite().any()) else draws.new_tensor(math.inf)
    clipped = torch.where(infinite, largest, draws)
    return KLEstimate(clipped.mean(), draws.std(correction=0), int(infinite.sum()), draws.numel())


def true_label_log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each label [Z, ...] in float64, from logits [Z, ..., C] and labels [...].

    Example:
        >>> true_label_log_probs(torch.zeros(1, 2, 2), torch.tensor([0, 1]))
        tensor([[-0.6931, -0.6931]], dtype=torch.float64)
    """
    check_floating("logits", logits, 2, "[Z, ..., C]")
    check_target(target, logits.shape[1:-1])
    log_probs = F.log_softmax(to_sum_dtype(logits), dim=-1)
    return log_probs.gather(-1, target.long().expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def joint_log_likelihood(log_probs: Tensor | Iterable[Tensor]) -> Tensor:
    """log of the mean over z of prod_t p_z(y_t | x_t), for each of S draws of tau labels.

    Args:
        log_probs: Log-probabilities of the true labels [Z, S, tau], whole or in parts along Z, which are read one after the
            other, so that a thousand indices need not be in memory at once.

    Returns:
        [S], in float64.

    Raises:
        InputError: There is no index.

    Source: ``calculate_joint_ll`` of ``enn.metrics.joint``.

    Example:
        >>> halves = torch.log(torch.tensor([[[0.9, 0.9]], [[0.1, 0.1]]]))
        >>> joint_log_likelihood(halves).exp()
        tensor([0.4100], dtype=torch.float64)
    """
    total: Tensor | None = None
    count = 0
    for part in [log_probs] if isinstance(log_probs, Tensor) else log_probs:
        check_floating("log_probs", part, 3, "[Z, S, tau]")
        if len(part) == 0:
            continue
        summed = to_sum_dtype(part).sum(2).logsumexp(0)
        total = summed if total is None else torch.logaddexp(total, summed)
        count += len(part)
    if total is None:
        raise InputError("Expected argument `log_probs` to hold at least one index z, but got none.")
    return total - math.log(count)


class Projection(NamedTuple):
    """Hyperplanes that sort hypotheses into cells.

    Attributes:
        weight: Their normals [P, tau, C].
        offset: [P].
    """

    weight: Tensor
    offset: Tensor


def random_projection(
    tau: int, num_classes: int, num_planes: int = 7, *, generator: torch.Generator | None = None
) -> Projection:
    """Random hyperplanes for :func:`clustered_log_likelihood`, normals and offsets standard normal.

    Args:
        tau: Labels predicted together.
        num_classes: C.
        num_planes: P; the testbed has 7, hence at most 128 cells.
        generator: Source of the draw; torch's global one without it.

    Raises:
        InputError: A number is below 1, or there are more than 16 planes.

    Example:
        >>> random_projection(tau=100, num_classes=2).weight.shape
        torch.Size([7, 100, 2])
    """
    for name, value in (("tau", tau), ("num_classes", num_classes), ("num_planes", num_planes)):
        check_integer(name, value, 1)
    if num_planes > _MAX_PLANES:
        raise InputError(f"Expected argument `num_planes` to be at most {_MAX_PLANES}, but got {num_planes}.")
    weight = torch.randn(num_planes, tau, num_classes, generator=generator, dtype=torch.float64)
    return Projection(weight, torch.randn(num_planes, generator=generator, dtype=torch.float64))


def clustered_log_likelihood(
    logits: Tensor | Iterable[Tensor], target: Tensor, projection: Projection, position: Tensor | None = None
) -> Tensor:
    """The testbed's estimate of log of the mean over z of prod_t p_z(y_t | x_t), for many labels together.

    Labels of a hundred different inputs leave a few of a thousand hypotheses that say anything, and the mean of their products
    falls far below its limit. So hypotheses that predict alike share their probabilities: each is the point of its probits
    u_tc = Phi^-1(p_tc), cut at +-5, and random hyperplanes sort the points into cells k. Then

        log sum_k (n_k / Z) prod_t q_kt,    q_kt = mean over z in cell k of p_z(y_t | x_t).

    It is :func:`joint_log_likelihood` (but for the cut) where tau is 1, where hypotheses of one cell agree, and hence where
    each has a cell of its own. Elsewhere it is biased, since labels count as independent within a cell: with few distinct
    inputs among many labels, as polyadic draws have them, it is mostly too low, and :func:`joint_log_likelihood` the better
    estimate. No probability is below Phi(-5) = 2.9e-7, so that no draw is infinite.

    Args:
        logits: [Z, N, C] at N inputs, whole or in parts along Z, which are read one after the other.
        target: [S, tau].
        projection: Hyperplanes, the same for all draws: :func:`random_projection`.
        position: Which of the N inputs each draw has: [S, tau]; without it N = S tau inputs stand in the draws' order.

    Returns:
        [S], in float64.

    Raises:
        InputError: Shapes do not fit, or there is no index or draw.

    Source: ``RandomProjection`` of ``neural_testbed.likelihood``, which serves it for tau > 10; its 1e-6 beside sums and
    counts is left out.

    Example:
        >>> logits = torch.tensor([[[2.0, -2.0]], [[-2.0, 2.0]]]).expand(2, 30, 2)  # a label at 30 inputs, or the other
        >>> target = torch.zeros(1, 30, dtype=torch.long)
        >>> planes = random_projection(30, 2, generator=torch.Generator().manual_seed(0))
        >>> clustered_log_likelihood(logits, target, planes)  # log 1/2 - 30 log(1 + exp(-4))
        tensor([-1.2376], dtype=torch.float64)
    """
    weight, offset = projection.weight.to(target.device).double(), projection.offset.to(target.device).double()
    num_planes, tau, num_classes = weight.shape
    draws = len(target)
    check_target(target, torch.Size([draws, tau]))
    if not draws:
        raise InputError("Expected argument `target` to hold at least one draw, but got none.")
    device = target.device
    if position is None:
        position = torch.arange(target.numel(), device=device).reshape(target.shape)
    if position.shape != target.shape:
        raise InputError(
            f"Expected argument `position` to be of shape {list(target.shape)}, but got {list(position.shape)}."
        )
    cells = 2**num_planes
    bits, first = 2 ** torch.arange(num_planes, device=device), cells * torch.arange(draws, device=device)
    counts = torch.zeros(draws * cells, dtype=torch.float64, device=device)
    sums = torch.zeros(draws * cells, tau, dtype=torch.float64, device=device)
    for part in [logits] if isinstance(logits, Tensor) else logits:
        check_floating("logits", part, 3, "[Z, N, C]")
        if part.shape[2] != num_classes or part.shape[1] <= int(position.max()):
            raise InputError(
                f"Expected argument `logits` to be [Z, N, {num_classes}] with N of at least {int(position.max()) + 1}, but "
                f"got shape {list(part.shape)}."
            )
        probits = torch.special.ndtri(part.double().softmax(-1)).clamp(-_CLIP, _CLIP)
        for some in torch.split(probits, max(1, _CHUNK // (target.numel() * num_classes))):
            drawn = some[:, position]  # [z, S, tau, C]
            sides = torch.einsum("zstc,ptc->zsp", drawn, weight) + offset > 0
            row = ((sides * bits).sum(-1) + first).flatten()
            probs = torch.special.ndtr(drawn.gather(3, target.long().expand(len(some), -1, -1).unsqueeze(3)))
            counts += torch.bincount(row, minlength=len(counts))
            sums.index_add_(0, row, probs.reshape(-1, tau))
    counts = counts.reshape(draws, cells)
    if not bool(counts.any()):
        raise InputError("Expected argument `logits` to hold at least one index z, but got none.")
    # An empty cell has weight 0: log 0 with any product.
    log_means = (sums.reshape(draws, cells, tau) / counts.clamp(min=1).unsqueeze(2)).log().sum(2)
    return (counts.log() + log_means).logsumexp(1) - counts.sum(1).log()


def uniform_kl(true_log_likelihood: Tensor, num_classes: int, tau: int) -> Tensor:
    """The divergence of equal probabilities for all classes, by which the testbed's leaderboard divides all others.

    Args:
        true_log_likelihood: [S], of the environment, for tau labels each.
        num_classes: C.
        tau: Labels predicted together.

    Returns:
        mean(true_log_likelihood) + tau log C, a scalar in float64.

    Example:
        >>> uniform_kl(torch.zeros(3), num_classes=2, tau=10)
        tensor(6.9315, dtype=torch.float64)
    """
    check_integer("num_classes", num_classes, 1)
    check_integer("tau", tau, 1)
    return to_sum_dtype(true_log_likelihood).mean() + tau * math.log(num_classes)


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """sum_c p_c log(p_c / q_c) over the last axis; a class that p excludes adds nothing.

    Args:
        p: Probabilities [..., C].
        q: Probabilities [..., C].

    Returns:
        [...] in nats; infinite where q excludes what p does not.

    Example:
        >>> categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor(0.6931, dtype=torch.float64)
    """
    p, q = to_sum_dtype(p), to_sum_dtype(q)
    terms: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return terms.sum(-1)


def log_sum_product(weights: Tensor, probs: Tensor) -> Tensor:
    """log of sum_k w_k prod_t q_kt, whatever the q of a term without weight are.

    Args:
        weights: w [K], not negative.
        probs: q [K, T].

    Returns:
        A scalar in float64.

    Example:
        >>> log_sum_product(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[0.9, 0.9], [0.1, 0.1], [0.0, 0.0]])).exp()
        tensor(0.4100, dtype=torch.float64)
    """
    used = weights > 0
    return (to_sum_dtype(weights[used]).log() + to_sum_dtype(probs[used]).log().sum(1)).logsumexp(0)


def gaussian_log_likelihood(error: Tensor, covariance: Tensor) -> Tensor:
    """Log-density of errors under N(0, covariance).

    Args:
        error: [..., tau].
        covariance: [tau, tau] or [..., tau, tau], positive definite.

    Returns:
        [...], in float64.

    Example:
        >>> gaussian_log_likelihood(torch.zeros(1), torch.eye(1))
        tensor(-0.9189, dtype=torch.float64)
    """
    error, covariance = to_sum_dtype(error), to_sum_dtype(covariance)
    factor = torch.linalg.cholesky(covariance)
    factor = factor.expand(*error.shape[:-1], *factor.shape[-2:])
    white = torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False).squeeze(-1)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_density: Tensor = -0.5 * (white.square().sum(-1) + error.shape[-1] * math.log(2 * math.pi)) - half_log_det
    return log_density


def gaussian_sample_kl(samples: Tensor, target: Tensor, noise_std: float, true_log_likelihood: Tensor) -> KLEstimate:
    """The testbed's divergence for regression: every index predicts its mean with the environment's own noise.

    Args:
        samples: Predicted means [Z, S, tau].
        target: [S, tau].
        noise_std: The noise's standard deviation, which the model is told.
        true_log_likelihood: [S], of the environment.

    Raises:
        InputError: ``noise_std`` is not positive, or the shapes do not fit.

    Source: ``GaussianSampleKL`` of ``neural_testbed.likelihood.regression``.

    Example:
        >>> true = gaussian_log_likelihood(torch.zeros(4, 1), torch.eye(1))
        >>> gaussian_sample_kl(torch.ones(1, 4, 1), torch.zeros(4, 1), noise_std=1.0, true_log_likelihood=true).mean
        tensor(0.5000, dtype=torch.float64)
    """
    check_floating("samples", samples, 3, "[Z, S, tau]")
    if samples.shape[1:] != target.shape:
        raise InputError(
            f"Expected argument `target` to be of shape {list(samples.shape[1:])}, but got {list(target.shape)}."
        )
    if not noise_std > 0:
        raise InputError(f"Expected argument `noise_std` to be above 0, but got {noise_std}.")
    scaled = (to_sum_dtype(samples) - to_sum_dtype(target)) / noise_std
    log_density = -0.5 * (scaled.square() + math.log(2 * math.pi)) - math.log(noise_std)
    return kl_estimate(true_log_likelihood, joint_log_likelihood(log_density))


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)), elementwise.

    The ENN paper's score of a Gaussian process problem is its mean over inputs, from the exact posterior
    (:func:`~lightning_uq.data.gp_posterior`) to a model's moments over z, 0.001 added to both standard deviations.

    Example:
        >>> gaussian_kl(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
        tensor(0.5000, dtype=torch.float64)
    """
    mean, std, other_mean, other_std = map(to_sum_dtype, (mean, std, other_mean, other_std))
    ratio = std / other_std
    return 0.5 * (ratio.square() + ((mean - other_mean) / other_std).square() - 1) - ratio.log()
