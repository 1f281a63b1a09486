import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_uq.errors import InputError
from lightning_uq.functional import student_t
from lightning_uq.functional.mixture import mixture_crps
from lightning_uq.predictions import StudentTPrediction

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


# ---------------------------------------------------------------------- the prediction


def prediction(n=4, **kwargs):
    generator = torch.Generator().manual_seed(n)
    location = torch.randn(n, 2, generator=generator)[None]
    nu, alpha, beta = torch.rand(3, n, 2, generator=generator)[:, None] + 0.2
    return StudentTPrediction(location, nu, alpha + 1.5, beta, **kwargs)


def test_moments_are_those_of_the_student_t():
    p = prediction()
    expected = stats.t(p.degrees_of_freedom[0].double().numpy(), p.mean.numpy(), p.scale[0].double().numpy())
    torch.testing.assert_close(p.variance.double(), torch.from_numpy(expected.var()), rtol=1e-5, atol=0)
    torch.testing.assert_close(p.variance, p.aleatoric_variance + p.epistemic_variance)
    y = torch.randn(4, 2)
    torch.testing.assert_close(
        p.log_prob(y), torch.from_numpy(expected.logpdf(y.double().numpy()).sum(-1)), rtol=1e-5, atol=1e-6
    )
    lower, upper = p.interval(0.9)
    torch.testing.assert_close(p.cdf(upper) - p.cdf(lower), torch.full((4, 2), 0.9).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.quantile(0.05), lower, rtol=1e-6, atol=1e-6)
    assert p.crps(y).shape == (4, 2)


def test_both_readings():
    p = prediction()
    nu, alpha, beta = (x[0] for x in (p.nu, p.alpha, p.beta))
    aleatoric, epistemic = p.uncertainties()
    torch.testing.assert_close(aleatoric, (beta / (alpha - 1)).sqrt())
    torch.testing.assert_close(epistemic, (beta / (alpha - 1) / nu).sqrt())
    aleatoric, epistemic = p.uncertainties("meinert")
    torch.testing.assert_close(aleatoric, (beta * (1 + nu) / (alpha * nu)).sqrt())
    torch.testing.assert_close(epistemic, 1 / nu.sqrt())


def test_it_is_a_prediction_like_the_others():
    parts = [prediction(1), prediction(3)]
    whole = StudentTPrediction.cat(parts)
    assert len(whole) == 4
    for name, value in whole.to_dict().items():
        torch.testing.assert_close(value, torch.cat([part.to_dict()[name] for part in parts]))
    assert whole.to(torch.float64).mean.dtype == torch.float64
    assert list(prediction(log_density=torch.zeros(4)).to_dict())[-1] == "log_density"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.log_prob(torch.zeros(4)), r"`target` must have shape \[4, 2\], but its shape is \[4\]"),
        (lambda p: p.interval(1.0), r"`level` must be in \(0, 1\), but it is 1.0"),
        (lambda p: p.quantile(0), r"`level` must be in \(0, 1\)"),
        (lambda p: p.uncertainties("both"), "`reading` must be 'amini' or 'meinert', but it is 'both'"),
        (lambda p: StudentTPrediction(*[torch.ones(4)] * 4), r"one shape \[Z, B, D\], but their shapes are \[4\], \[4\]"),
        (lambda p: StudentTPrediction(*[torch.ones(1, 4, 1)] * 4), "`alpha` above 1, but some of their values are not"),
        (lambda p: StudentTPrediction(*[torch.full((1, 1, 1), math.nan)] * 4), "values are not"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(prediction())
