"""The map from predicted probabilities to frequencies: against counting, and its inverse, slopes and integrals against definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.functional.quantile_recalibration import (
    LEAST,
    MIN_ROWS,
    extended_cdf,
    extended_quantile,
    fit_recalibration,
    recalibrate,
    tail_integrals,
    uncalibrated_levels,
)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num", [20, 57, 1000, 30_000])
def test_at_its_knots_the_map_is_the_empirical_frequency(num):
    u = rand(num, 2, seed=num) ** torch.tensor([2.0, 0.5])
    knots = fit_recalibration(u)
    for d in range(2):
        for predicted, calibrated in knots[:, d].T.tolist():
            share = float((u[:, d] <= predicted).double().mean())
            assert share == pytest.approx(calibrated, abs=1.01 / num)
    inner = knots[1].diff() * num
    assert bool((inner[inner > 0] >= MIN_ROWS - 1e-6).all())


@pytest.mark.parametrize("num", [20_000, 200])
def test_calibrated_probabilities_stay(num):
    knots = fit_recalibration(rand(num, 1))
    # The bound of Dvoretzky, Kiefer and Wolfowitz at a probability of 1e-6.
    assert float((knots[0] - knots[1]).abs().max()) < math.sqrt(math.log(2e6) / (2 * num))


def test_a_map_makes_fresh_probabilities_uniform():
    def miscalibrated(seed):
        return torch.special.ndtr(2 * torch.special.ndtri(rand(20_000, 1, seed=seed)) + 1)  # too narrow, and shifted

    knots = fit_recalibration(miscalibrated(0))
    fresh, _ = recalibrate(miscalibrated(1), knots)
    assert stats.kstest(miscalibrated(1)[:, 0].numpy(), "uniform").statistic > 0.2
    assert stats.kstest(fresh[:, 0].numpy(), "uniform").statistic < 0.02


values = st.lists(
    st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 1e-300, 1 - 1e-16, math.nan]), min_size=1, max_size=120
)


@given(values)
def test_any_probabilities_give_a_finite_increasing_map(values):
    u = torch.tensor(values, dtype=torch.float64)[:, None]
    if bool(u.isnan().all()):
        with pytest.raises(InputError, match="must hold a known number"):
            fit_recalibration(u)
        return
    knots = fit_recalibration(u)
    assert bool(knots.isfinite().all())
    for part in knots[:, 0]:
        ends = part[0].item(), part[-1].item()
        assert ends == (0.0, 1.0)
        assert bool((part.diff() > 0).all())
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    mapped, slope = recalibrate(grid, knots)
    assert bool((mapped.diff(dim=0) > 0).all())
    assert bool((slope > 0).all() and slope.isfinite().all())
    assert mapped[0] == 0
    assert mapped[-1] == 1
    torch.testing.assert_close(uncalibrated_levels(mapped[:, 0], knots)[0], grid[:, 0], atol=1e-6, rtol=0)


def test_below_twenty_rows_the_map_is_the_identity():
    torch.testing.assert_close(fit_recalibration(rand(19, 1) ** 9), torch.tensor([0.0, 1.0]).double().expand(2, 1, 2))


def test_targets_with_fewer_rows_have_fewer_knots():
    u = rand(400, 2)
    u[30:, 1] = math.nan
    knots = fit_recalibration(u)
    torch.testing.assert_close(knots[:, :1], fit_recalibration(u[:, :1]))
    few = fit_recalibration(u[:30, 1:])
    for value in (0.0, 0.3, 0.5, 0.77, 1.0):
        both = torch.full((1, 2), value, dtype=torch.float64)
        for i in range(2):
            torch.testing.assert_close(recalibrate(both, knots)[i][:, 1:], recalibrate(both[:, :1], few)[i])
            assert uncalibrated_levels(0.3, knots)[1] == uncalibrated_levels(0.3, few)[0]


def test_slopes_are_derivatives_on_any_axis():
    knots = fit_recalibration(rand(500, 3) ** 2)
    u = rand(4, 3, 5, seed=1)
    step = 1e-9
    expected = (recalibrate(u + step, knots, 1)[0] - recalibrate(u, knots, 1)[0]) / step
    torch.testing.assert_close(recalibrate(u, knots, 1)[1], expected, rtol=1e-4, atol=1e-4)
    for d in range(3):
        torch.testing.assert_close(
            recalibrate(u, knots, 1)[0][:, d], recalibrate(u[:, d, :, None], knots[:, d : d + 1])[0][..., 0]
        )


def test_ties_share_a_knot_in_the_middle_of_their_step():
    u = torch.tensor([0.2] * 50 + [0.6] * 50, dtype=torch.float64)[:, None]
    predicted, calibrated = fit_recalibration(u)[:, 0]
    assert predicted.tolist()[1] == 0.2
    assert predicted.tolist()[-2] == 0.6
    assert 0.1 < calibrated[1] < 0.4
    assert 0.6 < calibrated[-2] < 0.9


def test_probabilities_that_round_to_one_are_kept_apart_from_it():
    u = torch.ones(100, 1, dtype=torch.float64)
    assert bool((fit_recalibration(u)[0, 0, 1:-1] == 1 - LEAST).all())
    assert bool(recalibrate(u, fit_recalibration(u))[1].isfinite().all())


def test_integrals_of_a_mixture_by_scipy():
    mean, scale, weights = [-2.0, 0.5, 4.0], [0.1, 1.0, 2.0], [0.2, 0.5, 0.3]

    def cdf(x):
        return sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights, mean, scale, strict=True))

    rows = (torch.tensor(part).double()[:, None] for part in (mean, scale, [math.log(w) for w in weights]))
    components = Components(*rows)
    for center in (-30.0, -1.9, 0.0, 3.7, 100.0):
        first, second, squared = tail_integrals(
            lambda x: torch.tensor(cdf(x.numpy())), components, torch.tensor([center], dtype=torch.float64)
        )
        expected = sum(w * m for w, m in zip(weights, mean, strict=True)) - center
        assert float(first) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        moment = sum(w * ((m - center) ** 2 + s**2) for w, m, s in zip(weights, mean, scale, strict=True))
        assert float(second) == pytest.approx(moment, rel=1e-5)
        points = [-2.0, 0.5, 4.0, center]
        score = integrate.quad(lambda x, y=center: (cdf(x) - (x >= y)) ** 2, -40, 120, points=points, limit=500)[0]
        assert float(squared) == pytest.approx(score, rel=1e-4)


def test_integrals_of_a_student_t():
    one = torch.ones(1, 1).double()
    components = Components(0 * one, one, 0 * one, 4 * one)
    first, second, squared = tail_integrals(
        lambda x: torch.tensor(stats.t.cdf(x.numpy(), 4)), components, torch.tensor([1.0], dtype=torch.float64)
    )
    assert float(first) == pytest.approx(-1)
    assert float(second) == pytest.approx(3, rel=1e-3)
    expected = integrate.quad(lambda x: (stats.t.cdf(x, 4) - (x >= 1)) ** 2, -200, 200, points=[1], limit=500)[0]
    assert float(squared) == pytest.approx(expected, rel=1e-5)


LEVELS = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)


@given(st.integers(0, 100), st.booleans())
def test_quantiles_and_probabilities_are_inverse(seed, has_ties):
    quantiles = torch.sort(rand(6, 4, seed=seed), -1).values
    if has_ties:
        quantiles[:, 2] = quantiles[:, 1]
    levels = torch.cat([rand(20, seed=seed + 1), LEVELS, torch.tensor([1e-7, 1 - 1e-7])])
    previous = torch.full((6,), -math.inf, dtype=torch.float64)
    for level in levels.sort().values:
        value = extended_quantile(quantiles, LEVELS, level[None])
        assert bool(value.isfinite().all())
        assert bool((value >= previous).all())
        previous = value
        inside_tie = has_ties and 0.4 <= level <= 0.5
        if not inside_tie:
            torch.testing.assert_close(extended_cdf(quantiles, LEVELS, value), level.expand(6))
    for i, level in enumerate(LEVELS):
        torch.testing.assert_close(extended_quantile(quantiles, LEVELS, level[None]), quantiles[:, i])


def test_equal_quantiles_give_no_nan():
    quantiles = torch.ones(1, 4)
    for value in (0.0, 1.0, 2.0):
        assert 0 <= float(extended_cdf(quantiles, LEVELS, torch.tensor([value]))) <= 1
    assert float(extended_quantile(quantiles, LEVELS, torch.tensor([0.001]))) == pytest.approx(1.0)
