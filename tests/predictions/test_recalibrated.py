"""Recalibrated predictions of every type, by the definition P(Y <= y) = R(F(y))."""

import math
import pickle

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional.quantile_recalibration import recalibrate
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    NumberPrediction,
    PointPrediction,
    PooledRegressionPrediction,
    QuantilePrediction,
    RecalibratedPrediction,
    StudentTMixturePrediction,
)
from tests.predictions.test_scaled import DISTRIBUTIONS, SHAPES, randn

KNOTS = torch.tensor(
    [[[0.0, 0.1, 0.4, 0.8, 1.0], [0.0, 0.3, 1.0, 1.0, 1.0]], [[0.0, 0.3, 0.5, 0.7, 1.0], [0.0, 0.1, 1.0, 1.0, 1.0]]],
    dtype=torch.float64,
)
IDENTITY = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(2, 2, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_probabilities_are_mapped_and_quantiles_are_their_inverse(kind, shape):
    raw = DISTRIBUTIONS[kind](*shape)
    prediction, y = raw.recalibrated(KNOTS), 2 * randn(*shape, seed=7)
    torch.testing.assert_close(prediction.cdf(y), recalibrate(raw.cdf(y), KNOTS)[0])
    previous = torch.full(shape, -math.inf, dtype=torch.float64)
    for level in (0.001, 0.05, 0.2, 0.3, 0.31, 0.6, 0.95, 0.999):
        quantile = prediction.quantile(level)
        assert bool((quantile > previous).all())
        previous = quantile
        torch.testing.assert_close(
            prediction.cdf(quantile), torch.full(shape, level, dtype=torch.float64), rtol=1e-6, atol=1e-9
        )
    lower, upper = prediction.interval(0.8)
    torch.testing.assert_close(lower, prediction.quantile(0.1))
    torch.testing.assert_close(upper, prediction.quantile(0.9))
    assert torch.equal(prediction.covered(y, 0.8), (lower <= y) & (y <= upper))
    for level, count in zip((0.1, 0.9), prediction.counts_below(y, (0.1, 0.9)), strict=True):
        assert count == (y <= prediction.quantile(level)).sum()


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_identity_changes_no_marginal(kind):
    raw = DISTRIBUTIONS[kind](5, 2)
    prediction, y = raw.recalibrated(IDENTITY), 2 * randn(5, 2, seed=7)
    torch.testing.assert_close(prediction.cdf(y), raw.cdf(y))
    torch.testing.assert_close(prediction.crps(y), raw.crps(y), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prediction.mean, raw.mean, rtol=1e-3, atol=1e-3)
    for name in ("variance", "aleatoric_variance", "epistemic_variance"):
        torch.testing.assert_close(getattr(prediction, name), getattr(raw, name), rtol=1e-3, atol=1e-3)
    marginal = raw.components().log_density(y).sum(1)
    torch.testing.assert_close(prediction.log_prob(y), marginal)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_density_mean_variance_and_crps_by_integration(kind):
    prediction = DISTRIBUTIONS[kind](1, 1).recalibrated(KNOTS[:, :1])
    x = torch.linspace(-14, 14, 40_001, dtype=torch.float64).sinh()
    cdf = prediction[torch.zeros(len(x), dtype=torch.long)].cdf(x[:, None])[:, 0]
    middle, mass = (x[1:] + x[:-1]) / 2, cdf.diff()
    mean = (middle * mass).sum()
    torch.testing.assert_close(prediction.mean[0, 0], mean, rtol=1e-3, atol=1e-3)
    if kind in ("Gaussian", "mixture"):
        variance = ((middle - mean).square() * mass).sum()
        torch.testing.assert_close(prediction.variance[0, 0], variance, rtol=1e-3, atol=0)
    for y in (-3.0, 0.1, 2.0, 9.0):
        target = torch.tensor([[y]], dtype=torch.float64)
        score = torch.trapezoid((cdf - (x >= y).double()).square(), x)
        torch.testing.assert_close(prediction.crps(target)[0, 0], score, rtol=2e-3, atol=0)
        slope = (prediction.cdf(target + 1e-6) - prediction.cdf(target - 1e-6)) / 2e-6
        if slope > 1e-9:
            torch.testing.assert_close(prediction.log_prob(target), slope[0].log(), rtol=1e-3, atol=1e-3)


def test_the_variance_of_a_heavy_tail_has_no_end_cut_off():
    """Most of the variance at 2.1 degrees of freedom is further out than any sum over panels."""
    one = torch.ones(1, 1, 1).double()
    raw = StudentTMixturePrediction(0 * one, one, 2.1 * one)
    for outer, expected in ((1.0, 1.0), (0.5, 0.5)):
        inner = (1 - 2e-6 * outer) / (
            1 - 2e-6
        )  # the slope between the two probabilities beyond which the map is steeper, or flatter
        u = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0]).double()
        v = torch.tensor([0.0, 1e-6 * outer, 1 - 1e-6 * outer, 1.0]).double()
        found = raw.recalibrated(torch.stack([u, v])[:, None]).variance
        edge = float(raw.quantile(1e-6).abs())
        x = torch.linspace(-edge, edge, 2_000_001, dtype=torch.float64)
        inside = torch.trapezoid(x.square() * raw[torch.zeros(len(x)).long()].log_prob(x[:, None]).exp(), x)
        total = inner * inside + expected * (raw.variance[0, 0] - inside)
        torch.testing.assert_close(found[0, 0], total, rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_maps_rows_slices_and_copies_commute_with_it(kind):
    raw = DISTRIBUTIONS[kind](5, 3, 4, 2)
    y = randn(5, 3, 4, 2, seed=7)
    prediction, maps = raw.recalibrated(KNOTS), raw.as_maps().recalibrated(KNOTS)
    torch.testing.assert_close(maps.cdf(y.movedim(-1, 1)), prediction.cdf(y).movedim(-1, 1))
    torch.testing.assert_close(maps.quantile(0.3), prediction.quantile(0.3).movedim(-1, 1))
    torch.testing.assert_close(maps.mean, prediction.mean.movedim(-1, 1))
    torch.testing.assert_close(maps.as_rows().crps(y.reshape(-1, 2)), prediction.crps(y).reshape(-1, 2))
    assert type(prediction[:2]) is type(prediction)
    torch.testing.assert_close(
        NumberPrediction.cat([prediction[:2], prediction[2:]]).quantile(0.3), prediction.quantile(0.3)
    )
    torch.testing.assert_close(pickle.loads(pickle.dumps(prediction)).cdf(y), prediction.cdf(y))
    half = prediction.to(torch.bfloat16)
    assert half.recalibration.dtype == torch.float64
    torch.testing.assert_close(half.quantile(0.3).double(), prediction.quantile(0.3).double(), rtol=0.1, atol=0.1)
    pooled = prediction.pool()
    assert isinstance(pooled, PooledRegressionPrediction)
    torch.testing.assert_close(pooled.variance, prediction.variance)
    assert torch.equal(pooled.recalibration, KNOTS)
    assert isinstance(prediction.raw, type(raw))
    assert torch.equal(prediction.raw.cdf(y), raw.cdf(y))
    assert set(prediction.to_dict(interval=0.9)) == set(raw.to_dict(interval=0.9))
    assert torch.equal(prediction.calibrations["recalibration"], KNOTS)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_missing_targets_and_far_ones_are_no_nan(kind):
    prediction = DISTRIBUTIONS[kind](5, 2).recalibrated(KNOTS)
    y = torch.tensor([[math.nan, 0.0], [math.nan, math.nan], [1e8, -1e8], [0.0, 0.0], [50.0, -50.0]]).double()
    log_prob, crps = prediction.log_prob(y), prediction.crps(y)
    assert log_prob.isnan().tolist() == [False, True, False, False, False]
    assert bool((log_prob[2:] < math.inf).all())
    assert torch.equal(crps.isnan(), y.isnan())
    torch.testing.assert_close(crps[2], y[2].abs(), rtol=1e-3, atol=0)


def test_an_input_that_is_not_finite_stays_nan():
    prediction = GaussianMixturePrediction(torch.tensor([[[math.nan], [0.0]]]), torch.ones(1, 2, 1)).recalibrated(
        KNOTS[:, :1]
    )
    y = torch.zeros(2, 1)
    for values in (
        prediction.cdf(y),
        prediction.quantile(0.3),
        prediction.mean,
        prediction.variance,
        prediction.crps(y),
    ):
        assert values[:, 0].isnan().tolist() == [True, False]
    assert prediction.score("variance").tolist()[0] == math.inf


def test_predictions_without_a_distribution_are_refused():
    point = PointPrediction(torch.zeros(1, 5, 2))
    with pytest.raises(InputError, match="has no distribution functions"):
        point.recalibrated(KNOTS)
    with pytest.raises(InputError, match="Put VarianceScaling before it"):
        point.recalibration_rows(torch.zeros(5, 2))
    raw = DISTRIBUTIONS["Gaussian"](5, 2)
    for refused in (raw.pool(), raw.recalibrated(KNOTS)):
        with pytest.raises(InputError, match="no distribution functions|was already recalibrated"):
            refused.recalibrated(KNOTS)
    with pytest.raises(InputError, match=r"knots of a recalibration must have shape \[2, 2, K\]"):
        raw.recalibrated(KNOTS[:, :1])
    with pytest.raises(InputError, match="Put VarianceScaling before QuantileRecalibration"):
        raw.recalibrated(KNOTS).scaled(torch.ones(2))
    with pytest.raises(InputError, match="Put VarianceScaling before QuantileRecalibration"):
        raw.recalibrated(KNOTS).scaling_rows(torch.ones(5, 2))
    with pytest.raises(InputError, match=r"raw.components\(\)"):
        raw.recalibrated(KNOTS).components()
    assert isinstance(raw.scaled(torch.ones(2)).recalibrated(KNOTS), RecalibratedPrediction)


LEVELS = torch.tensor([0.1, 0.5, 0.9])


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("maps", [False, True])
def test_quantiles_move_to_their_calibrated_levels(members, maps):
    quantiles = randn(members, 4, 5, 2, 3).sort(-1).values
    raw = QuantilePrediction(quantiles, LEVELS)
    prediction = (raw.as_maps() if maps else raw).recalibrated(KNOTS)
    rows = raw.recalibrated(KNOTS)
    assert type(prediction) is QuantilePrediction
    assert torch.equal(prediction.levels, LEVELS)
    assert bool((prediction.member_quantiles.diff(dim=-1) >= 0).all())
    for i, level in enumerate(LEVELS.tolist()):
        # The share of targets below the new quantile is what the map gives to its probability before.
        u = raw.recalibration_rows(rows.quantiles[..., i])
        torch.testing.assert_close(
            recalibrate(u, KNOTS)[0], torch.full_like(u, level, dtype=torch.float64), rtol=1e-5, atol=1e-6
        )
    if maps:
        torch.testing.assert_close(prediction.as_rows().quantiles, rows.quantiles.reshape(-1, 2, 3))
    unchanged = raw.recalibrated(IDENTITY)
    torch.testing.assert_close(unchanged.member_quantiles, raw.member_quantiles)
    with pytest.raises(InputError, match="outside the predicted levels"):
        prediction.quantile(0.05)
    for refused, knots, match in (
        (prediction, KNOTS, "was already recalibrated"),
        (raw, KNOTS[:, :1], r"must have shape \[2, 2, K\]"),
        (QuantilePrediction(randn(3, 4, 2, 3).sort(-1).values, LEVELS).pool(), KNOTS, "needs the members"),
    ):
        with pytest.raises(InputError, match=match):
            refused.recalibrated(knots)


def test_one_quantile_cannot_be_recalibrated():
    prediction = QuantilePrediction(torch.zeros(1, 3, 2, 1), torch.tensor([0.5]))
    for refused in (lambda: prediction.recalibrated(KNOTS), lambda: prediction.recalibration_rows(torch.zeros(3, 2))):
        with pytest.raises(InputError, match="needs quantiles at two levels or more"):
            refused()
