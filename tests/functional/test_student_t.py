import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_uq.functional import student_t
from lightning_uq.functional.mixture import mixture_crps

DF = [1.0, 2.0, 2.01, 3.5, 10.0, 100.0, 1e4, 1e8]
Y = [-1e6, -40.0, -3.0, -0.5, 0.0, 1e-8, 0.7, 2.0, 12.0, 1e9]


def grid():
    df, y = torch.meshgrid(torch.tensor(DF, dtype=torch.float64), torch.tensor(Y, dtype=torch.float64), indexing="ij")
    return y, df, torch.full_like(y, 0.3), torch.full_like(y, 2.0)


def test_density_and_distribution_are_scipy_s():
    y, df, location, scale = grid()
    expected = stats.t(df.numpy(), location.numpy(), scale.numpy())
    density = torch.from_numpy(expected.logpdf(y.numpy()))
    torch.testing.assert_close(student_t.student_t_log_prob(*grid()), density, rtol=1e-9, atol=1e-7)
    distribution = torch.from_numpy(expected.cdf(y.numpy()))
    torch.testing.assert_close(student_t.student_t_cdf(*grid()), distribution, rtol=0, atol=2e-7)
    firm = df >= 5
    torch.testing.assert_close(student_t.student_t_cdf(*grid())[firm], distribution[firm], rtol=0, atol=1e-8)


@pytest.mark.parametrize("level", [1e-4, 0.025, 0.5, 0.9, 0.9999])
def test_quantiles_are_scipy_s(level):
    df = torch.tensor([2.0, 2.01, 3.5, 10.0, 100.0, 1e4, 1e8], dtype=torch.float64)
    value = student_t.student_t_quantile(level, df, torch.full_like(df, 0.3), torch.full_like(df, 2.0))
    expected = torch.from_numpy(stats.t(df.numpy(), 0.3, 2.0).ppf(level))
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(value[3:], expected[3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("df", [59.0, 1e6, 1e10, 1e12, 1e16, 1e100])
def test_many_degrees_of_freedom_keep_the_digits(df):
    one = torch.ones(3, dtype=torch.float64)
    y = torch.tensor([-5.0, -0.5, 3.0], dtype=torch.float64)
    cdf = torch.from_numpy(stats.t(df).cdf(y.numpy()))
    torch.testing.assert_close(student_t.student_t_cdf(y, df * one, 0 * one, one), cdf, rtol=1e-7, atol=0.0)
    for level in (1e-6, 0.3, 0.975):
        value = student_t.student_t_quantile(level, df * one, 0 * one, one)
        torch.testing.assert_close(value, stats.t(df).ppf(level) * one, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("df", [1.5, 2.5, 6.0, 50.0])
@pytest.mark.parametrize("y", [-3.0, 0.3, 8.0])
def test_crps_is_its_integral(df, y):
    t = stats.t(df, 0.3, 2.0)
    below = integrate.quad(lambda u: t.cdf(u) ** 2, -np.inf, y)[0]
    above = integrate.quad(lambda u: t.sf(u) ** 2, y, np.inf)[0]
    value = student_t.student_t_crps(*(torch.tensor(x, dtype=torch.float64) for x in (y, df, 0.3, 2.0)))
    assert float(value) == pytest.approx(below + above, rel=1e-5)


def test_with_many_degrees_of_freedom_it_is_gaussian():
    y = torch.tensor([[-1.0], [0.0], [5.0]], dtype=torch.float64)
    mean, scale, df = torch.full_like(y, 0.3), torch.full_like(y, 2.0), torch.full_like(y, 1e7)
    expected = mixture_crps(mean[None], scale.square()[None], y)
    torch.testing.assert_close(student_t.student_t_crps(y, df, mean, scale), expected, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- mixtures


def mixture(z, seed, spread):
    """Parameters [Z, 1] with degrees of freedom from just above 2 and scales over ``spread`` powers of ten."""
    rng = np.random.default_rng(seed)
    df, scale = 2 + 10 ** rng.uniform(-3, 3, z), 10 ** rng.uniform(-spread / 2, spread / 2, z)
    return [torch.from_numpy(x)[:, None] for x in (df, rng.normal(size=z) * 10 ** rng.uniform(-2, 2), scale)]


def integral(y, df, location, scale):
    """The integral of (F - 1[u >= y])^2 by scipy, between all places where F may bend."""
    parts = [stats.t(*each) for each in zip(df.flatten(), location.flatten(), scale.flatten(), strict=True)]
    bends = {
        float(m + k * s) for m, s in zip(location.flatten(), scale.flatten(), strict=True) for k in (-30, -3, 0, 3, 30)
    }
    ends = [-np.inf, *sorted({*bends, y}), np.inf]

    def square(u):
        return np.mean([t.cdf(u) if u < y else t.sf(u) for t in parts]) ** 2

    return sum(integrate.quad(square, *pair, epsabs=0, epsrel=1e-9, limit=400)[0] for pair in itertools.pairwise(ends))


@pytest.mark.parametrize(("z", "spread"), [(2, 0), (2, 1), (3, 5), (4, 3)])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
def test_crps_of_a_mixture_is_its_integral(z, spread, seed):
    parameters = mixture(z, seed, spread)
    for y in (-3.0, 0.2, 50.0):
        value = student_t.student_t_mixture_crps(torch.tensor([y]), *parameters)
        assert float(value) == pytest.approx(integral(y, *parameters), rel=1e-6)


@pytest.mark.parametrize("z", [2, 7, 40])
@pytest.mark.parametrize("df", [2.02, 5.0, 1e6])
def test_copies_of_a_component_have_its_crps(z, df):
    y = torch.tensor([-1e3, -1.0, 0.3, 2.0], dtype=torch.float64)
    one = [torch.full((1, 4), x, dtype=torch.float64) for x in (df, 0.3, 2.0)]
    expected = student_t.student_t_crps(y, *one)[0]
    found = student_t.student_t_mixture_crps(y, *(x.repeat(z, 1) for x in one))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(student_t.student_t_mixture_crps(y, *one), expected)


def test_with_many_degrees_of_freedom_a_mixture_is_gaussian():
    y = torch.tensor([[-1.0], [0.0], [5.0]], dtype=torch.float64)
    mean = torch.tensor([-2.0, 0.0, 10.0], dtype=torch.float64)[:, None, None].expand(3, 3, 1)
    scale = torch.tensor([0.01, 1.0, 3.0], dtype=torch.float64)[:, None, None].expand(3, 3, 1)
    expected = mixture_crps(mean, scale.square(), y)
    found = student_t.student_t_mixture_crps(y, torch.full_like(mean, 1e8), mean, scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_many_components_of_unlike_scales():
    df, location, scale = mixture(100, 0, 1)
    exact = student_t.student_t_mixture_crps(torch.zeros(1), df, location, scale)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = student_t.student_t_mixture_crps(torch.zeros(1), df[order], location[order], scale[order])
    torch.testing.assert_close(shuffled, exact)
    draws = torch.from_numpy(
        stats.t(df.numpy(), location.numpy(), scale.numpy()).rvs((100, 5000), random_state=0)
    ).flatten()
    again = draws[torch.randperm(len(draws), generator=torch.Generator().manual_seed(0))]
    assert float(exact) == pytest.approx(float(draws.abs().mean() - (draws - again).abs().mean() / 2), rel=2e-2)


def test_memory_is_bounded_by_parts(monkeypatch):
    parameters = [x.expand(3, 50) + torch.arange(50) / 50 for x in mixture(3, 1, 1)]
    whole = student_t.student_t_mixture_crps(torch.zeros(50), *parameters)
    monkeypatch.setattr(student_t, "_ELEMENTS", 1)
    torch.testing.assert_close(student_t.student_t_mixture_crps(torch.zeros(50), *parameters), whole)
    assert student_t.student_t_mixture_crps(torch.zeros(0), *(x[:, :0] for x in parameters)).shape == (0,)


@pytest.mark.parametrize("level", [1e-4, 0.025, 0.5, 0.9, 0.9999])
def test_quantiles_of_a_mixture(level):
    for seed in range(3):
        parameters = mixture(3, seed, 2)
        value = student_t.student_t_mixture_quantile(level, *parameters)
        t = stats.t(*(x.numpy() for x in parameters))
        assert t.cdf(value.numpy()).mean() == pytest.approx(level, abs=1e-7)


def test_the_mean_distance_is_an_integral():
    for df in (2.1, 6.0, 100.0):
        t = stats.t(df, 0.3, 2.0)
        for y in (-3.0, 0.3, 8.0):
            expected = integrate.quad(t.cdf, -np.inf, y)[0] + integrate.quad(t.sf, y, np.inf)[0]
            value = student_t.student_t_mean_absolute(*(torch.tensor(x) for x in (y, df, 0.3, 2.0)))
            assert float(value) == pytest.approx(expected, rel=1e-5)


def test_gradients():
    y = torch.tensor([0.2, 1.0], dtype=torch.float64, requires_grad=True)
    parameters = [x.expand(3, 2).clone().requires_grad_() for x in mixture(3, 0, 0.5)]
    assert torch.autograd.gradcheck(student_t.student_t_mixture_crps, (y, *parameters), atol=1e-4, rtol=1e-3)
