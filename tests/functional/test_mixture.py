import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from lightning_uq.functional import mixture


def components(seed: int, z: int = 3, b: int = 4, d: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(z, b, d, generator=generator, dtype=torch.float64)
    return mean, torch.rand(z, b, d, generator=generator, dtype=torch.float64) + 0.05


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_moments_are_those_of_the_mixture(seed, z):
    mean, variance = components(seed, z=z)
    center, total = mixture.mixture_moments(mean, variance)
    torch.testing.assert_close(center, mean.mean(0))
    torch.testing.assert_close(total, (variance + mean**2).mean(0) - center**2)


def test_the_variance_is_not_negative_where_the_textbook_form_is():
    generator = torch.Generator().manual_seed(0)
    mean = 300 + 0.01 * torch.randn(5, 1000, 1, generator=generator)
    variance = torch.full_like(mean, 3.35e-4)
    assert ((variance + mean**2).mean(0) - mean.mean(0) ** 2 < 0).any()
    exact = mixture.mixture_moments(mean.double(), variance.double())[1]
    torch.testing.assert_close(mixture.mixture_moments(mean, variance)[1].double(), exact, rtol=1e-4, atol=0)


def test_log_prob_and_cdf_agree_with_scipy():
    mean, variance = components(3)
    value = torch.randn(4, 2, dtype=torch.float64)
    normal = stats.norm(mean.numpy(), variance.sqrt().numpy())
    expected = torch.as_tensor(normal.pdf(value.numpy())).mean(0).log()
    torch.testing.assert_close(mixture.mixture_log_prob(mean, variance, value), expected)
    torch.testing.assert_close(
        mixture.mixture_cdf(mean, variance, value), torch.as_tensor(normal.cdf(value.numpy())).mean(0)
    )


def test_log_prob_far_from_every_component_is_finite():
    assert mixture.mixture_log_prob(torch.zeros(2, 1, 1), torch.ones(2, 1, 1), torch.tensor([[1e3]])).isfinite().all()


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 0.025, 0.5, 0.9, 1 - 1e-6]))
def test_quantile_inverts_the_cdf(seed, level):
    mean, variance = components(seed)
    value = mixture.mixture_quantile(mean, variance, level)
    torch.testing.assert_close(
        mixture.mixture_cdf(mean, variance, value),
        torch.full((4, 2), level, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-12,
    )


def test_crps_is_the_integral_of_its_definition():
    mean, variance = components(5, b=1, d=1)
    target = torch.tensor([[0.7]], dtype=torch.float64)

    def squared(x: float) -> float:
        cdf = mixture.mixture_cdf(mean, variance, torch.tensor([[x]], dtype=torch.float64)).item()
        return (cdf - float(x >= 0.7)) ** 2

    expected = integrate.quad(squared, -15, 0.7)[0] + integrate.quad(squared, 0.7, 15)[0]
    assert mixture.mixture_crps(mean, variance, target).item() == pytest.approx(expected, abs=1e-7)


def test_crps_of_one_gaussian_is_its_closed_form():
    z = 0.7 / 2
    expected = 2 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / torch.pi**0.5)
    value = mixture.mixture_crps(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 4.0), torch.tensor([[0.7]]))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_upcast():
    mean, variance = (t.bfloat16() for t in components(1))
    assert mixture.mixture_moments(mean, variance)[1].dtype == torch.float32
    assert mixture.mixture_quantile(mean, variance, 0.3).dtype == torch.float32
