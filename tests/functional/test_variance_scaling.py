"""The factor of a variance, by its definition: the likelihood, or the pinball loss, of the stretched predictions, searched by scipy."""

import math

import pytest
import torch
from scipy import optimize

from lightning_uq.errors import InputError
from lightning_uq.functional.quantiles import pinball
from lightning_uq.functional.variance_scaling import fit_quantile_stretch, fit_residual_variance, fit_stretch
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    PointPrediction,
    QuantilePrediction,
    StudentTMixturePrediction,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


LEVELS = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
MAKE = {
    "Gaussian": lambda n: GaussianMixturePrediction(randn(1, n, 1), randn(1, n, 1, seed=1).exp()),
    "Gaussians": lambda n: GaussianMixturePrediction(randn(4, n, 1), 0.3 * randn(4, n, 1, seed=1).exp()),
    "Student-t": lambda n: StudentTMixturePrediction(
        randn(1, n, 1), randn(1, n, 1, seed=1).exp(), 3 + randn(1, n, 1, seed=2).exp()
    ),
    "Student-ts": lambda n: StudentTMixturePrediction(
        randn(3, n, 1), randn(3, n, 1, seed=1).exp(), 3 + randn(3, n, 1, seed=2).exp()
    ),
    "mixture": lambda n: MixtureDensityPrediction(
        randn(2, n, 1, 3), 2 * randn(2, n, 1, 3, seed=1), 0.3 * randn(2, n, 1, 3, seed=2).exp()
    ),
}


def draws(prediction) -> torch.Tensor:
    """One target [N, 1] of each row, drawn from what was predicted."""
    location, scale, log_weight, df = prediction.components()
    generator = torch.Generator().manual_seed(5)
    chosen = torch.multinomial(log_weight[..., 0].exp().T, 1, generator=generator).T[..., None]
    z = torch.randn(location.shape[1:], generator=generator).double()
    if df is not None:
        torch.manual_seed(5)
        z = z / (torch.distributions.Chi2(df.gather(0, chosen)[0]).sample() / df.gather(0, chosen)[0]).sqrt()
    return location.gather(0, chosen)[0] + scale.gather(0, chosen)[0] * z


@pytest.mark.parametrize("factor", [1.0, 9.0, 0.01])
@pytest.mark.parametrize("kind", MAKE)
def test_a_known_factor_is_found(kind, factor):
    prediction = MAKE[kind](20_000)
    y = prediction.mean + math.sqrt(factor) * (draws(prediction) - prediction.mean)
    found = fit_stretch(*prediction.scaling_rows(y))
    torch.testing.assert_close(found, torch.full_like(found, factor), rtol=0.04, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MAKE)
def test_no_factor_has_a_greater_likelihood(kind, seed):
    prediction, y = MAKE[kind](12), 3 * randn(12, 1, seed=10 + seed)

    def nll(log_s: float) -> float:
        factor = torch.tensor([math.exp(2 * log_s)], dtype=torch.float64)
        return -float(prediction.scaled(factor).log_prob(y).mean())

    (found,) = fit_stretch(*prediction.scaling_rows(y)).tolist()
    best = optimize.minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert nll(0.5 * math.log(found)) <= min(best.fun, nll(0.0)) + 1e-9


def test_one_gaussian_has_a_closed_form():
    prediction, y = MAKE["Gaussian"](50), randn(50, 1, seed=3)
    expected = ((y - prediction.mean).square() / prediction.variance).mean()
    torch.testing.assert_close(fit_stretch(*prediction.scaling_rows(y)), expected[None])


@pytest.mark.parametrize("members", [1, 4])
def test_the_variance_of_means_has_the_greatest_likelihood(members):
    prediction, y = PointPrediction(randn(members, 30, 1)), 2 * randn(30, 1, seed=3)

    def nll(variance: float) -> float:
        return -float(prediction.scaled(torch.tensor([variance], dtype=torch.float64)).log_prob(y).mean())

    (found,) = fit_residual_variance(*prediction.scaling_rows(y)).tolist()
    best = optimize.minimize_scalar(nll, bounds=(0.01, 50), method="bounded", options={"xatol": 1e-9})
    assert nll(found) <= best.fun + 1e-9
    if members == 1:
        assert found == pytest.approx(float((y - prediction.mean).square().mean()))


@pytest.mark.parametrize("num", [1, 2, 15])
@pytest.mark.parametrize("seed", range(4))
def test_no_factor_of_quantiles_has_a_lower_pinball_loss(num, seed):
    prediction = QuantilePrediction(randn(2, num, 1, 4, seed=seed).sort(-1).values, LEVELS)
    outermost = torch.tensor([0, 3]).repeat(num)[:num, None]
    y = 1.5 * prediction.quantiles[:, 0].gather(1, outermost) + 0.1 * randn(num, 1, seed=10 + seed)

    def loss(s: float) -> float:
        scaled = prediction.scaled(torch.tensor([s**2], dtype=torch.float64))
        return float(pinball(scaled.quantiles, y.unsqueeze(-1), LEVELS).sum())

    s = math.sqrt(fit_quantile_stretch(*prediction.scaling_rows(y)))
    assert loss(s) <= min(loss(0.001 + 0.02 * i) for i in range(1000)) + 1e-9


def test_a_known_factor_of_quantiles_is_found():
    z = torch.special.ndtri(LEVELS)
    prediction = QuantilePrediction((1 + 0.5 * z).expand(1, 20_000, 1, 4), LEVELS)
    y = 1 + 1.5 * randn(20_000, 1)
    torch.testing.assert_close(
        fit_quantile_stretch(*prediction.scaling_rows(y)), torch.tensor([9.0], dtype=torch.float64), rtol=0.05, atol=0
    )


FITS = {
    "distribution": (fit_stretch, MAKE["Gaussians"]),
    "means": (fit_residual_variance, lambda n: PointPrediction(randn(3, n, 1))),
    "quantiles": (
        fit_quantile_stretch,
        lambda n: QuantilePrediction(randn(1, n, 1, 4).sort(-1).values, LEVELS),
    ),
}


@pytest.mark.parametrize("kind", FITS)
def test_missing_targets_are_left_out_and_steps_share_a_factor(kind):
    fit, make = FITS[kind]
    rows = make(12).scaling_rows(randn(12, 1, seed=3))
    missing = make(12).scaling_rows(torch.where(torch.arange(12)[:, None] < 7, randn(12, 1, seed=3), math.nan))
    torch.testing.assert_close(fit(*missing), fit(*(part[:7] for part in rows)))
    two = [torch.stack([part[:6], part[6:]], -2) for part in rows]  # [N, ..., H, D]
    torch.testing.assert_close(fit(*two), fit(*rows))
    with pytest.raises(InputError, match="must hold a known number for each target dimension"):
        fit(*make(12).scaling_rows(torch.full((12, 1), math.nan)))


@pytest.mark.parametrize("kind", FITS)
def test_targets_that_are_the_predictions_fit_no_spread(kind):
    fit, make = FITS[kind]
    prediction = make(5)
    if kind == "means":
        prediction = PointPrediction(prediction.member_mean[:1])
    with pytest.raises(InputError, match="`target` must differ from the point predictions"):
        fit(*prediction.scaling_rows(prediction.point))


def test_heavy_tails_do_not_hide_the_factor():
    prediction = StudentTMixturePrediction(*(torch.full((1, 4000, 1), v).double() for v in (0.0, 1.0, 3.0)))
    y = draws(prediction)
    y[0] = 1e12
    assert float(fit_stretch(*prediction.scaling_rows(y))) == pytest.approx(1.0, rel=0.1)


def test_quantiles_that_are_best_at_their_median_have_no_factor():
    y = torch.zeros(10, 1).double()
    y[0] = 1.0
    prediction = QuantilePrediction(torch.tensor([-1.0, -0.5, 0.0, 1.0]).double().expand(1, 10, 1, 4), LEVELS)
    with pytest.raises(InputError, match="lowest pinball loss at a spread of 0"):
        fit_quantile_stretch(*prediction.scaling_rows(y))
