"""Predictions of a mean alone, of quantiles, of a Student-t and of a mixture density, by scipy and by sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    PointPrediction,
    QuantilePrediction,
    StudentTMixturePrediction,
    StudentTPrediction,
)

NAN = math.nan


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def mixture(z=2, b=4, d=2, k=3):
    return MixtureDensityPrediction(randn(z, b, d, k), randn(z, b, d, k, seed=1), randn(z, b, d, k, seed=2).exp())


def student(z=2, b=4, d=2):
    return StudentTMixturePrediction(randn(z, b, d), randn(z, b, d, seed=1).exp(), 2.5 + randn(z, b, d, seed=2).exp())


# ---------------------------------------------------------------------- a mean alone


def test_several_means_have_a_spread_and_nothing_else():
    members = randn(5, 4, 2)
    prediction = PointPrediction(members)
    torch.testing.assert_close(prediction.mean, members.mean(0))
    torch.testing.assert_close(prediction.epistemic_variance, members.var(0, correction=0))
    assert prediction.score("epistemic_variance").shape == (4,)
    y = randn(4, 2, seed=3)
    torch.testing.assert_close(PointPrediction(members[:1]).crps(y), (members[0] - y).abs())
    assert set(prediction.to_dict(interval=0.9)) == {"mean", "epistemic_variance"}
    for read in (
        lambda p: p.variance,
        lambda p: p.aleatoric_variance,
        lambda p: p.interval(0.9),
        lambda p: p.quantile(0.5),
        lambda p: p.log_prob(y),
        lambda p: p.cdf(y),
        lambda p: p.covered(y, 0.9),
    ):
        with pytest.raises(InputError, match=r"has no `\w+`: it does not predict the noise.*head='mean_variance'"):
            read(prediction)


def test_one_mean_has_no_variance_at_all():
    one = PointPrediction(randn(1, 4, 2))
    assert set(one.to_dict()) == {"mean"}
    for read in (lambda: one.epistemic_variance, lambda: one.score("epistemic_variance")):
        with pytest.raises(InputError, match="one network has no `epistemic_variance`: train several networks"):
            read()
    with pytest.raises(InputError, match="has no score 'variance'. It has none"):
        one.score("variance")
    assert one.pool() is one


def test_pooled_means_keep_mean_and_spread_but_no_members():
    whole = PointPrediction(randn(40, 4, 2).float())
    pooled = whole.pool()
    assert isinstance(pooled, PointPrediction)
    assert pooled.num_indices is None
    assert whole.num_indices == 40
    torch.testing.assert_close(pooled.mean, whole.mean)
    assert torch.equal(pooled.epistemic_variance, whole.epistemic_variance)
    assert torch.equal(PointPrediction.cat([pooled[:1], pooled[1:]]).epistemic_variance, pooled.epistemic_variance)
    with pytest.raises(InputError, match="`crps` needs the members, which were pooled"):
        pooled.crps(torch.zeros(4, 2))
    with pytest.raises(InputError, match="`members_variance` must have shape"):
        PointPrediction(randn(2, 4, 2), members_variance=torch.ones(4, 2))


# ---------------------------------------------------------------------- quantiles

LEVELS = torch.tensor([0.1, 0.5, 0.9])


def quantiles(z=3, b=4, d=2):
    return randn(z, b, d, 3).sort(-1).values


def test_quantiles_of_several_networks_are_averaged():
    members = quantiles()
    prediction = QuantilePrediction(members, LEVELS)
    mean = members.mean(0)
    torch.testing.assert_close(prediction.median, mean[..., 1])
    low, high = prediction.interval(0.8)
    torch.testing.assert_close(low, mean[..., 0])
    torch.testing.assert_close(high, mean[..., 2])
    torch.testing.assert_close(prediction.quantile(0.3), (mean[..., 0] + mean[..., 1]) / 2)
    torch.testing.assert_close(prediction.interval_width, high - low)
    torch.testing.assert_close(prediction.epistemic_variance, members.var(0, correction=0).mean(-1))
    assert (prediction.quantiles.diff(dim=-1) >= 0).all()
    assert {name: tuple(value.shape) for name, value in prediction.to_dict(0.8).items()} == {
        **dict.fromkeys(["quantile_0.1", "quantile_0.5", "quantile_0.9"], (4, 2)),
        **dict.fromkeys(["lower", "upper", "epistemic_variance"], (4, 2)),
    }
    assert "lower" not in prediction.to_dict(0.95)
    pooled = prediction.pool()
    torch.testing.assert_close(pooled.interval(0.8), prediction.interval(0.8))
    assert torch.equal(pooled.epistemic_variance, prediction.epistemic_variance)


def test_levels_survive_half_precision():
    prediction = QuantilePrediction(quantiles(), LEVELS).to(torch.bfloat16)
    assert prediction.member_quantiles.dtype == torch.bfloat16
    assert torch.equal(prediction.levels, LEVELS)
    assert all(bound.isfinite().all() for bound in prediction.interval(0.8))


def test_coverage_and_counts_of_quantiles():
    prediction = QuantilePrediction(torch.tensor([[[[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]]]]), LEVELS)
    y = torch.tensor([[0.5], [3.0], [NAN]])
    assert prediction.covered(y, 0.8).squeeze(1).tolist() == [True, False, False]
    assert prediction.counts_below(y, (0.1, 0.5, 0.9)).tolist() == [0.0, 1.0, 1.0]
    assert prediction.pinball(y)[0].item() == pytest.approx((0.1 * 0.5 + 0.5 * 0.5 + 0.1 * 1.5) / 3)


def test_what_quantiles_do_not_tell():
    prediction = QuantilePrediction(quantiles(), LEVELS)
    with pytest.raises(InputError, match="has no `mean`: a few quantiles do not determine it. Read `median`"):
        _ = prediction.mean
    for name in ("cdf", "crps"):
        with pytest.raises(InputError, match=f"has no `{name}`: nothing is known beyond its outermost quantiles"):
            getattr(prediction, name)(torch.zeros(4, 2))
    with pytest.raises(InputError, match="level 0.05 lies outside the predicted levels, 0.1 to 0.9"):
        prediction.interval(0.9)
    with pytest.raises(InputError, match="has no `variance`: a few quantiles do not determine it. Read"):
        _ = prediction.variance


def test_bad_quantiles():
    with pytest.raises(InputError, match="must increase along the last axis, but some cross"):
        QuantilePrediction(quantiles().flip(-1), LEVELS)
    with pytest.raises(InputError, match=r"must have shape \[Z, B, D, Q\] and `levels` \[Q\]"):
        QuantilePrediction(quantiles(), LEVELS[:2])
    with pytest.raises(InputError, match="`levels` must be numbers"):
        QuantilePrediction(quantiles(), LEVELS.flip(0))


# ---------------------------------------------------------------------- likelihoods


def test_a_student_t_is_scipys():
    prediction, y = student(z=1), randn(4, 2, seed=5)
    t = stats.t(prediction.degrees_of_freedom[0].numpy(), prediction.location[0].numpy(), prediction.scale[0].numpy())
    torch.testing.assert_close(prediction.log_prob(y), torch.from_numpy(t.logpdf(y.numpy()).sum(1)))
    torch.testing.assert_close(prediction.cdf(y), torch.from_numpy(t.cdf(y.numpy())), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prediction.variance, torch.from_numpy(t.var()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.quantile(0.9), torch.from_numpy(t.ppf(0.9)), rtol=1e-5, atol=1e-6)
    low, high = prediction.interval(0.8)
    torch.testing.assert_close((low, high), (prediction.quantile(0.1), prediction.quantile(0.9)), rtol=1e-5, atol=1e-6)


def test_evidence_is_a_student_t_of_the_same_parameters():
    g = randn(2, 3, 1).exp()
    evidential = StudentTPrediction(randn(2, 3, 1), g, g + 1.5, 2 * g)
    plain = StudentTMixturePrediction(evidential.location, evidential.scale, evidential.degrees_of_freedom)
    y = randn(3, 1, seed=4)
    for name in ("log_prob", "cdf", "crps"):
        assert torch.equal(getattr(evidential, name)(y), getattr(plain, name)(y))
    assert torch.equal(evidential.mean, plain.mean)
    # The variances add up to the same total, and are split another way.
    torch.testing.assert_close(evidential.variance, plain.variance)


def test_bad_student_t():
    with pytest.raises(InputError, match="`scale` must be positive and `degrees_of_freedom` above 2"):
        StudentTMixturePrediction(randn(1, 2, 1), -torch.ones(1, 2, 1), 3 * torch.ones(1, 2, 1))


def test_a_mixture_by_sampling():
    prediction = mixture(b=2)
    generator = torch.Generator().manual_seed(0)
    num = 200_000
    samples = []
    for z in range(2):
        weights = prediction.weights[z].reshape(4, 3)
        k = torch.multinomial(weights, num // 2, replacement=True, generator=generator)
        mean, variance = (
            getattr(prediction, name)[z].reshape(4, 3).gather(1, k) for name in ("member_mean", "member_variance")
        )
        samples.append(mean + variance.sqrt() * torch.randn(mean.shape, generator=generator).double())
    samples = torch.cat(samples, 1)
    torch.testing.assert_close(prediction.mean.flatten(), samples.mean(1), rtol=0.05, atol=0.03)
    torch.testing.assert_close(prediction.variance.flatten(), samples.var(1), rtol=0.05, atol=0.03)
    torch.testing.assert_close(prediction.quantile(0.8).flatten(), samples.quantile(0.8, 1), rtol=0.05, atol=0.03)
    y = torch.zeros(2, 2).double()
    torch.testing.assert_close(prediction.cdf(y).flatten(), (samples <= 0).double().mean(1), rtol=0.02, atol=0.01)
    few = samples[:, torch.randperm(num, generator=generator)[:3000]]
    crps = few.abs().mean(1) - 0.5 * (few[:, :1500] - few[:, 1500:]).abs().mean(1)
    torch.testing.assert_close(prediction.crps(y).flatten(), crps, rtol=0.1, atol=0.05)


def test_a_mixture_of_one_component_is_a_gaussian():
    mean, variance, y = randn(3, 4, 2), randn(3, 4, 2, seed=1).exp(), randn(4, 2, seed=2)
    one = MixtureDensityPrediction(randn(3, 4, 2, 1), mean.unsqueeze(-1), variance.unsqueeze(-1))
    gaussian = GaussianMixturePrediction(mean, variance)
    for name in ("mean", "variance", "epistemic_variance", "aleatoric_variance"):
        torch.testing.assert_close(getattr(one, name), getattr(gaussian, name))
    for name in ("log_prob", "cdf", "crps"):
        torch.testing.assert_close(getattr(one, name)(y), getattr(gaussian, name)(y))
    torch.testing.assert_close(one.interval(0.8), gaussian.interval(0.8))


# ---------------------------------------------------------------------- all of them

MAKERS = {
    "gaussian": lambda shape: GaussianMixturePrediction(randn(2, *shape), randn(2, *shape, seed=1).exp()),
    "student": lambda shape: StudentTMixturePrediction(
        randn(2, *shape), randn(2, *shape, seed=1).exp(), 3 + randn(2, *shape).exp()
    ),
    "mixture": lambda shape: MixtureDensityPrediction(
        randn(2, *shape, 3), randn(2, *shape, 3, seed=1), randn(2, *shape, 3, seed=2).exp()
    ),
    "evidential": lambda shape: StudentTPrediction(
        randn(2, *shape), 1 + 0 * randn(2, *shape), 3 + 0 * randn(2, *shape), 1 + 0 * randn(2, *shape)
    ),
}
each_density = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_density
def test_a_horizon_is_as_many_targets(make):
    """[B, H, D] gives the numbers of [B, H D]."""
    horizon = make((4, 3, 2))
    y = randn(4, 3, 2, seed=7)
    assert horizon.target_shape == (4, 3, 2)
    flat = type(horizon)(**{n: t.flatten(2, 3) for n, t, axis in horizon._present() if axis is not None})
    for name in ("mean", "variance", "epistemic_variance"):
        torch.testing.assert_close(getattr(horizon, name).flatten(1), getattr(flat, name))
        torch.testing.assert_close(horizon.score("variance"), flat.score("variance"))
    torch.testing.assert_close(horizon.log_prob(y), flat.log_prob(y.flatten(1)))
    torch.testing.assert_close(horizon.cdf(y).flatten(1), flat.cdf(y.flatten(1)))
    torch.testing.assert_close(horizon.crps(y).flatten(1), flat.crps(y.flatten(1)))
    assert horizon.interval(0.9)[0].shape == (4, 3, 2)
    assert horizon.pool().variance.shape == (4, 3, 2)
    assert len(horizon[1:3]) == 2


@each_density
def test_missing_targets_are_left_out_of_a_density(make):
    whole = make((3, 2))
    y = randn(3, 2, seed=7)
    missing = y.clone()
    missing[0, 1], missing[2] = NAN, NAN
    found = whole.log_prob(missing)
    first = type(whole)(**{n: t[:, :, :1] for n, t, axis in whole._present() if axis is not None})
    torch.testing.assert_close(found[0], first.log_prob(y[:, :1])[0])
    torch.testing.assert_close(found[1], whole.log_prob(y)[1])
    assert found[2].isnan()
    for name in ("cdf", "crps"):
        assert torch.equal(getattr(whole, name)(missing).isnan(), missing.isnan())
    assert not whole.covered(missing, 0.999999)[2].any()
    assert whole.counts_below(missing, (0.1, 0.9)).max() <= 3


@given(seed=st.integers(0, 50))
@settings(max_examples=15)
def test_the_order_of_hypotheses_is_irrelevant(seed):
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    y = randn(4, 2, seed=seed)
    point, several = PointPrediction(randn(3, 4, 2, seed=seed)), mixture(z=3)
    again = PointPrediction(point.member_mean[order])
    torch.testing.assert_close(again.crps(y), point.crps(y))
    torch.testing.assert_close(again.epistemic_variance, point.epistemic_variance)
    shuffled = several.replace(**{n: t[order] for n, t, _ in several._present()})
    torch.testing.assert_close(shuffled.log_prob(y), several.log_prob(y))
    torch.testing.assert_close(shuffled.variance, several.variance)


def test_a_target_without_its_last_axis():
    y = randn(4)
    for prediction in (PointPrediction(randn(3, 4, 1)), mixture(d=1), student(d=1)):
        torch.testing.assert_close(prediction.crps(y), prediction.crps(y.unsqueeze(1)))


def test_a_component_of_weight_zero_adds_nothing_however_far_it_lies():
    means = torch.tensor([[[[1.0, 3e30]], [[1.0, -3e38]]]])  # whose squared distance is infinite in float32
    logits = torch.tensor([0.0, -1000.0]).expand_as(means)
    prediction = MixtureDensityPrediction(logits, means, torch.full_like(means, 2.0))
    torch.testing.assert_close(prediction.variance, torch.full((2, 1), 2.0))
    torch.testing.assert_close(prediction.mean, torch.ones(2, 1))
