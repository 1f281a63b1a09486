"""The last layer's posterior against its definition: dense matrices, exact Bayesian regression, autograd's Hessian."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy

from lightning_uq.functional import laplace as la

N, P = 30, 4


@pytest.fixture
def phi():
    return la.with_bias(torch.randn(N, P - 1, dtype=torch.float64))


def regression(phi, noise=0.3, precision=2.0, mean=None):
    values, vectors = la.eigen((phi.T @ phi)[None])
    one = torch.ones(1, dtype=torch.float64)
    mean = torch.zeros(1, P).double() if mean is None else mean
    return la.LastLayerPosterior(mean, values, vectors, one / noise, one[None], precision * one, noise * one)


def test_the_variance_is_that_of_bayesian_linear_regression(phi):
    posterior, x = regression(phi), torch.randn(5, P, dtype=torch.float64)
    covariance = (phi.T @ phi / 0.3 + 2.0 * torch.eye(P)).inverse()
    torch.testing.assert_close(la.output_variance(posterior, x)[:, 0], torch.einsum("bp,pq,bq->b", x, covariance, x))


def test_samples_have_the_posteriors_covariance(phi):
    posterior = regression(phi)
    drawn = la.weight_samples(posterior, torch.randn(200_000, 1, P, dtype=torch.float64))[:, 0]
    covariance = (phi.T @ phi / 0.3 + 2.0 * torch.eye(P)).inverse()
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.05, atol=1e-3)


def test_the_marginal_likelihood_of_means_is_the_dense_one(phi):
    """At the posterior's mode, the Laplace evidence of a linear model is N(y; 0, phi phi^T / lambda + s^2 I)."""
    y = phi @ torch.randn(P, dtype=torch.float64) + 0.5 * torch.randn(N, dtype=torch.float64)
    for noise in (0.05, 0.1, 0.2, 0.4):
        for precision in (0.1, 0.5, 1.0, 3.0):
            mode = torch.linalg.solve(phi.T @ phi + precision * noise * torch.eye(P), phi.T @ y)
            error = (y - phi @ mode).square().sum()
            log_likelihood = -0.5 * (N * math.log(2 * math.pi * noise) + error / noise)
            found = log_likelihood + la.log_evidence_terms(regression(phi, noise, precision, mode[None]))[0]
            covariance = phi @ phi.T / precision + noise * torch.eye(N)
            dense = MultivariateNormal(torch.zeros(N, dtype=torch.float64), covariance).log_prob(y)
            torch.testing.assert_close(found, dense)


def test_noise_and_precision_are_where_the_evidence_is_largest(phi):
    weight = torch.randn(1, P, dtype=torch.float64)
    error = torch.tensor([7.0], dtype=torch.float64)

    def evidence(noise, precision):
        posterior = regression(phi, noise, precision, weight)
        return float(-0.5 * (N * math.log(noise) + error / noise) + la.log_evidence_terms(posterior)[0])

    values, _ = la.eigen((phi.T @ phi)[None])
    count = torch.tensor([float(N)], dtype=torch.float64)
    noise, precision = (float(x) for x in la.marginal_noise(values, error, weight.square().sum(1), count))
    best = evidence(noise, precision)
    step = 10 ** (1 / 4)
    assert best >= max(evidence(noise * a, precision * b) for a in (0.9, 1, 1.1) for b in (1 / step, step))
    # Only the ratio of both is on a grid: for its own, the noise is the best of all.
    assert best > max(evidence(noise * a, precision / a) for a in (0.99, 1.01))


def test_a_shared_precision_is_where_the_sum_of_evidences_is_largest(phi):
    values, vectors = la.eigen((phi.T @ phi)[None])
    curvature, basis = torch.tensor([0.2, 0.05], dtype=torch.float64), torch.linalg.qr(torch.randn(3, 2).double())[0]
    weight = torch.randn(3, P, dtype=torch.float64)
    posterior = la.LastLayerPosterior(
        weight, values, vectors, curvature, basis, torch.ones(2).double(), torch.zeros(3).double()
    )
    chosen = la.marginal_precision(posterior, shared=True)
    assert chosen.prior_precision[0] == chosen.prior_precision[1]
    best = la.log_evidence_terms(chosen).sum()
    for factor in (10**-0.25, 10**0.25):
        other = la.with_precision(posterior, factor * chosen.prior_precision[0])
        assert la.log_evidence_terms(other).sum() < best


def test_held_out_noise_is_the_best(phi):
    residual, q = torch.randn(50, 1).double(), torch.stack([torch.rand(50, 1), 3 * torch.rand(50, 1)]).double()

    def nll(noise, spread):
        variance = noise * (1 + spread)
        return float((variance.log() + residual.square() / variance).sum())

    count = torch.tensor([50.0]).double()
    noise, best = la.held_out_noise((residual.square() / (1 + q)).sum(1), q.log1p().sum(1), count)
    lowest = nll(noise, q[int(best)])
    for spread in q:
        assert all(nll(s2, spread) >= lowest - 1e-9 for s2 in torch.linspace(0.1, 3, 60).double())


def test_the_softmax_curvature_is_autograds_hessian():
    """For one row the Kronecker product is exact."""
    torch.manual_seed(3)
    phi, W = torch.randn(P, dtype=torch.float64), torch.randn(3, P, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: cross_entropy((w @ phi)[None], torch.tensor([1])), W)
    p = (W @ phi).softmax(0)
    values, vectors = la.eigen(torch.outer(phi, phi)[None])
    curvature, basis = la.softmax_directions(torch.diag(p) - torch.outer(p, p))
    posterior = la.LastLayerPosterior(
        W, values, vectors, curvature, basis, torch.full((2,), 0.7).double(), torch.zeros(3)
    )
    # The dense posterior, in the directions that change the probabilities.
    dense = (hessian.reshape(3 * P, 3 * P) + 0.7 * torch.eye(3 * P)).inverse().reshape(3, P, 3, P)
    x = torch.randn(P, dtype=torch.float64)
    logits = torch.einsum("apbq,p,q->ab", dense, x, x)
    centre = torch.eye(3).double() - 1 / 3
    expected = (centre @ logits @ centre).diagonal()
    torch.testing.assert_close(la.output_variance(posterior, x[None])[0], expected)


def test_one_number_added_to_all_logits_has_no_uncertainty():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    values, vectors = la.softmax_directions(torch.diag(p) - torch.outer(p, p))
    assert values.shape == (2,)
    assert bool((values > 0).all())
    torch.testing.assert_close(vectors.sum(0), torch.zeros(2, dtype=torch.float64))


def test_probit_approximates_the_mean_of_a_sigmoid():
    mean, variance = torch.tensor([-1.5, 0.3, 2.0]), torch.tensor([0.5, 2.0, 6.0])
    draws = mean + variance.sqrt() * torch.randn(400_000, 3)
    torch.testing.assert_close((mean * la.probit_scale(variance)).sigmoid(), draws.sigmoid().mean(0), atol=0.02, rtol=0)


def test_draws_do_not_depend_on_the_signs_of_eigenvectors(phi):
    posterior, noise = regression(phi), torch.randn(3, 1, P, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    other = posterior._replace(eigenvectors=posterior.eigenvectors * signs)
    torch.testing.assert_close(la.weight_samples(other, noise), la.weight_samples(posterior, noise))
    values, vectors = la.eigen((phi.T @ phi)[None])
    assert bool((vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all())
    torch.testing.assert_close(vectors[0] @ torch.diag(values[0]) @ vectors[0].T, phi.T @ phi)
