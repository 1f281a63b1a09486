"""A mixture without labels, against scikit-learn's and its own definitions."""

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.gaussian_mixture import fit_mixture, in_order


def blobs(n=600, D=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=generator)
    centers = torch.tensor([[0.0, 0, 0], [6.0, 0, 0], [0, 8.0, 4.0]], dtype=torch.float64)
    mixing = torch.randn(3, D, D, generator=generator, dtype=torch.float64) / 2 + torch.eye(D)
    noise = torch.randn(n, 1, D, generator=generator, dtype=torch.float64) @ mixing[which]
    return centers[which] + noise.squeeze(1)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "tied"])
def test_it_is_the_maximum_that_scikit_learn_finds(covariance):
    mixture = pytest.importorskip("sklearn.mixture")
    x = blobs()
    mine = GaussianDensity(fit_mixture(x, 3, covariance, 1e-6))
    kind = {"full": "full", "diagonal": "diag", "tied": "tied"}[covariance]
    theirs = mixture.GaussianMixture(3, covariance_type=kind, n_init=5, random_state=0, tol=1e-8, max_iter=500).fit(x)
    # Covariances here divide by n - 1.
    assert float(mine.log_density(x).mean()) == pytest.approx(theirs.score(x), abs=0.02)
    order = torch.cdist(mine.mean, torch.as_tensor(theirs.means_)).argmin(1)
    torch.testing.assert_close(mine.mean, torch.as_tensor(theirs.means_)[order], rtol=0.05, atol=0.05)
    torch.testing.assert_close(mine.log_prior.exp(), torch.as_tensor(theirs.weights_)[order], rtol=0.05, atol=0.01)


def test_its_log_density_is_the_mixtures():
    x, points = blobs(), torch.randn(7, 3, dtype=torch.float64)
    fit = fit_mixture(x, 2, regularization=0.1)
    covariances = torch.linalg.inv(fit.whitening.mT @ fit.whitening)
    parts = torch.distributions.MultivariateNormal(fit.mean, covariances)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(fit.log_prior.exp()), parts)
    torch.testing.assert_close(GaussianDensity(fit).log_density(points), expected.log_prob(points))
    assert float(fit.log_prior.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("regularization", ["oas", 0.01])
def test_one_component_is_one_gaussian(regularization):
    x = blobs()
    statistics = ClassStatistics(1, 3)
    statistics.update(x, torch.zeros(len(x), dtype=torch.long))
    expected = fit_gaussian(statistics, regularization=regularization)
    found = fit_mixture(x, 1, regularization=regularization)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.whitening, expected.whitening)


def test_held_out_shrinkage_is_chosen_for_the_components():
    x = blobs(n=60, D=3)
    wide = torch.cat([x, 0.1 * torch.randn(60, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)], 1)
    fit = fit_mixture(wide, 3)
    assert float(fit.target) in (0, 1, 2)
    assert 0 < float(fit.shrinkage) <= 1
    assert fit.whitening.isfinite().all()


def test_the_order_is_a_matter_of_the_rows():
    x = torch.randn(2, 50, 4)
    order = torch.randperm(50)
    assert torch.equal(in_order(x[:, order]), in_order(x))
    assert fit_mixture(blobs(), 2, seed=3).mean.equal(fit_mixture(blobs(), 2, seed=3).mean)


def test_what_cannot_be_fitted():
    with pytest.raises(InputError, match=r"at least two rows for each of the 3 components, but its shape is \[5, 2\]"):
        fit_mixture(torch.randn(5, 2), 3)
    with pytest.raises(InputError, match="`num_components` must be"):
        fit_mixture(torch.randn(5, 2), 0)
    x = torch.zeros(9, 2, dtype=torch.float64)
    x[0] = 1e6
    with pytest.raises(InputError, match="Choose a smaller `num_components`"):
        fit_mixture(x + 1e-3 * torch.randn(9, 2), 2)
