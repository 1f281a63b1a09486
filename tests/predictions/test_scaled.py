"""Predictions stretched about their point: every type, by the definition y -> point + s (y - point)."""

import pytest
import torch

from lightning_uq import predictions
from lightning_uq.errors import InputError
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    NumberPrediction,
    PointPrediction,
    PooledRegressionPrediction,
    QuantilePrediction,
    StudentTMixturePrediction,
    StudentTPrediction,
)

LEVELS = torch.tensor([0.1, 0.4, 0.5, 0.9])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def above(least, *shape, seed):
    return least + randn(*shape, seed=seed).exp()


DISTRIBUTIONS = {
    "Gaussian": lambda *b: GaussianMixturePrediction(randn(3, *b), above(0, 3, *b, seed=1)),
    "Student-t": lambda *b: StudentTMixturePrediction(randn(2, *b), above(0, 2, *b, seed=1), above(2.5, 2, *b, seed=2)),
    "evidential": lambda *b: StudentTPrediction(randn(2, *b), *(above(1.2, 2, *b, seed=i) for i in (1, 2, 3))),
    "mixture": lambda *b: MixtureDensityPrediction(
        randn(2, *b, 3), randn(2, *b, 3, seed=1), above(0, 2, *b, 3, seed=2)
    ),
}
OTHERS = {
    "pooled": lambda *b: PooledRegressionPrediction(randn(*b), above(0, *b, seed=1), above(0, *b, seed=2)),
    "quantiles": lambda *b: QuantilePrediction(randn(2, *b, 4).sort(-1).values, LEVELS),
}
SHAPES = [(5, 2), (5, 4, 2)]
FACTOR = torch.tensor([4.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_distribution_is_stretched_about_its_mean(kind, shape):
    raw = DISTRIBUTIONS[kind](*shape)
    scaled = raw.scaled(FACTOR)
    s, y = FACTOR.sqrt(), 2 * randn(*shape, seed=7)
    torch.testing.assert_close(scaled.mean, raw.mean)
    torch.testing.assert_close(scaled.aleatoric_variance, FACTOR * raw.aleatoric_variance)
    torch.testing.assert_close(scaled.epistemic_variance, FACTOR * raw.epistemic_variance)
    torch.testing.assert_close(scaled.variance, FACTOR * raw.variance)
    moved = raw.mean + s * (y - raw.mean)
    torch.testing.assert_close(scaled.cdf(moved), raw.cdf(y))
    torch.testing.assert_close(scaled.crps(moved), s * raw.crps(y), rtol=1e-5, atol=1e-8)
    num = y[0].numel() / 2
    torch.testing.assert_close(scaled.log_prob(moved), raw.log_prob(y) - num * s.log().sum())
    for own, new in zip(raw.interval(0.8), scaled.interval(0.8), strict=True):
        torch.testing.assert_close(new, raw.mean + s * (own - raw.mean))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_components_have_the_marginal_density(kind):
    raw = DISTRIBUTIONS[kind](5, 1)
    y = randn(5, 1, seed=7)
    torch.testing.assert_close(raw.components().log_density(y)[:, 0], raw.log_prob(y).double())


@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_move_from_their_median(shape):
    raw = OTHERS["quantiles"](*shape)
    scaled = raw.scaled(FACTOR)
    for level in (0.1, 0.3, 0.5, 0.9):
        torch.testing.assert_close(
            scaled.quantile(level), raw.median + FACTOR.sqrt() * (raw.quantile(level) - raw.median)
        )
    torch.testing.assert_close(scaled.epistemic_variance, FACTOR * raw.epistemic_variance)
    assert bool((scaled.member_quantiles.diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, *OTHERS])
def test_pooling_maps_and_dtypes_commute_with_it(kind):
    raw = {**DISTRIBUTIONS, **OTHERS}[kind](5, 3, 4, 2)
    scaled = raw.scaled(FACTOR)
    maps = raw.as_maps().scaled(FACTOR)
    for name, tensor in maps.as_rows().__getstate__().items():
        if tensor is not None:
            expected = scaled.as_maps().as_rows().__getstate__()[name]
            torch.testing.assert_close(tensor, expected)
    score = "interval_width" if kind == "quantiles" else "epistemic_variance"
    torch.testing.assert_close(raw.pool().scaled(FACTOR).score(score), scaled.pool().score(score))
    half = raw.to(torch.bfloat16).scaled(FACTOR.float())
    torch.testing.assert_close(half.point.double(), scaled.point, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.score(score).double(), scaled.score(score), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_means_become_gaussians(shape):
    point = PointPrediction(randn(3, *shape), log_density=randn(5))
    scaled = point.scaled(FACTOR)
    assert isinstance(scaled, GaussianMixturePrediction)
    torch.testing.assert_close(scaled.mean, point.mean)
    torch.testing.assert_close(scaled.aleatoric_variance, FACTOR.expand(shape))
    torch.testing.assert_close(scaled.epistemic_variance, point.epistemic_variance)
    pooled = point.pool().scaled(FACTOR)
    assert isinstance(pooled, PooledRegressionPrediction)
    torch.testing.assert_close(pooled.variance, scaled.variance)
    for one in (scaled, pooled):
        assert torch.equal(one.log_density, point.log_density)
        assert torch.equal(one.variance_scale, FACTOR)


def test_means_of_maps_become_gaussians_of_maps():
    scaled = PointPrediction(randn(1, 5, 3, 4, 2)).as_maps().scaled(FACTOR)
    assert scaled.map_shape == (3, 4)
    torch.testing.assert_close(scaled.variance, FACTOR.reshape(2, 1, 1).expand(5, 2, 3, 4))


@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, *OTHERS])
def test_a_prediction_tells_that_it_was_scaled(kind):
    scaled = {**DISTRIBUTIONS, **OTHERS}[kind](5, 2).scaled(FACTOR)
    assert torch.equal(scaled.calibrations["variance_scale"], FACTOR)
    assert torch.equal(scaled.pool().variance_scale, FACTOR)
    assert torch.equal(type(scaled).cat([scaled[:2], scaled[2:]]).variance_scale, FACTOR)
    with pytest.raises(InputError, match="was already scaled"):
        scaled.scaled(FACTOR)


@pytest.mark.parametrize("make", [*DISTRIBUTIONS.values(), lambda *b: PointPrediction(randn(1, *b))])
@pytest.mark.parametrize("shape", [(1,), (), (3,)])
def test_a_factor_of_another_shape_is_no_factor_for_all(make, shape):
    for prediction in (make(5, 2), make(5, 4, 4, 2).as_maps()):
        with pytest.raises(InputError, match=r"`factor` must have shape \[2\], one number per target"):
            prediction.scaled(torch.ones(shape))


def test_every_number_with_a_unit_says_it():
    """Else it would stay as it is where the others are scaled."""
    without = {
        "nu",
        "alpha",
        "inverse_nu",
        "degrees_of_freedom",
        "member_logits",
        "levels",
        "grid",
        "mean",
        "score_summary",
    }
    kinds = [
        kind for kind in vars(predictions).values() if isinstance(kind, type) and issubclass(kind, NumberPrediction)
    ]
    assert len(kinds) > 6
    for kind in kinds:
        for name, field in kind._fields.items():
            assert field.unit or field.fitted_by or name in without, f"{kind.__name__}.{name}"
            assert not name.endswith("variance") or field.unit == "variance", f"{kind.__name__}.{name}"
