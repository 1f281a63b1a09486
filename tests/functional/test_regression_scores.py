"""Scores of intervals, quantiles, ensembles of numbers, probability integrals and sparsification, by their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_pinball_loss

from lightning_uq.errors import InputError
from lightning_uq.functional.ensemble_crps import empirical_crps
from lightning_uq.functional.intervals import interval_score
from lightning_uq.functional.mixture import mixture_cdf, mixture_crps, mixture_quantile
from lightning_uq.functional.pit import pit_counts, pit_distance
from lightning_uq.functional.quantiles import check_levels, pinball, quantile_at
from lightning_uq.functional.sparsification import ause, sparsification_curve
from lightning_uq.functional.targets import aligned_target, known_targets, sum_over_targets

NAN = math.nan
numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# ---------------------------------------------------------------------- CRPS of a few numbers


@given(members=numbers, target=st.floats(-1e6, 1e6, width=32))
@settings(max_examples=60)
def test_empirical_crps_by_all_pairs(members, target):
    x, y = torch.tensor(members, dtype=torch.float64).unsqueeze(1), torch.tensor([target], dtype=torch.float64)
    expected = (x - y).abs().mean() - 0.5 * (x - x.T).abs().mean()
    torch.testing.assert_close(empirical_crps(x, y)[0], expected, rtol=1e-9, atol=1e-6)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(empirical_crps(x[order], y), empirical_crps(x, y), rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(empirical_crps(x.repeat(3, 1), y), empirical_crps(x, y), rtol=1e-9, atol=1e-6)


def test_empirical_crps_is_the_integral_of_its_definition():
    """CRPS = integral of (F(t) - 1[y <= t])^2 dt."""
    x, y = randn(5, 1), torch.tensor([0.3]).double()
    t = np.linspace(-6, 6, 2_000_001)
    cdf = (x.numpy() <= t).mean(0)
    expected = np.trapezoid((cdf - (y.item() <= t)) ** 2, t)
    assert empirical_crps(x, y).item() == pytest.approx(expected, abs=1e-5)


def test_empirical_crps_far_from_zero_keeps_its_digits():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(empirical_crps(x + 1e6, torch.tensor([1e6])), empirical_crps(x, torch.zeros(1)))


def test_empirical_crps_is_the_limit_of_narrow_gaussians():
    x, y = randn(4, 3, 2), randn(3, 2, seed=1)
    narrow = mixture_crps(x, torch.full_like(x, 1e-14), y)
    torch.testing.assert_close(empirical_crps(x, y), narrow, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- weighted mixtures


def test_weights_of_a_mixture_stand_for_repeated_components():
    mean, variance, y = randn(2, 3, 2), randn(2, 3, 2, seed=1).exp(), randn(3, 2, seed=2)
    weights = torch.tensor([0.25, 0.75]).double().reshape(2, 1, 1).expand(2, 3, 2)
    four = [0, 1, 1, 1]
    for function in (mixture_cdf, mixture_crps):
        torch.testing.assert_close(
            function(mean, variance, y, weights), function(mean[four], variance[four], y), rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(
        mixture_quantile(mean, variance, 0.3, weights), mixture_quantile(mean[four], variance[four], 0.3)
    )


# ---------------------------------------------------------------------- quantiles and intervals


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
def test_pinball_is_scikit_learns(level):
    q, y = randn(40), randn(40, seed=1)
    expected = mean_pinball_loss(y.numpy(), q.numpy(), alpha=level)
    assert pinball(q, y, level).mean().item() == pytest.approx(expected, rel=1e-12)


def test_pinball_is_least_at_the_quantile():
    y, grid = randn(2001), torch.linspace(-3, 3, 601).double()
    losses = torch.stack([pinball(q, y, 0.8).mean() for q in grid])
    assert grid[losses.argmin()].item() == pytest.approx(float(np.quantile(y.numpy(), 0.8)), abs=0.011)


def test_a_quantile_between_two_levels_is_linear_and_outside_refused():
    levels, quantiles = (0.1, 0.5, 0.9), torch.tensor([[0.0, 1.0, 5.0]])
    assert [quantile_at(quantiles, levels, level).item() for level in (0.1, 0.3, 0.5, 0.9)] == [0.0, 0.5, 1.0, 5.0]
    assert quantile_at(quantiles, levels, (1 - 0.8) / 2).item() == 0.0  # 0.09999999999999998
    for level in (0.05, 0.95):
        with pytest.raises(InputError, match=r"level 0.[09]5 lies outside the predicted levels, 0.1 to 0.9"):
            quantile_at(quantiles, levels, level)


@pytest.mark.parametrize("levels", [(), (0.5, 0.1), (0.1, 0.1), (0.0, 0.5), (0.5, 1.0), 0.5, ("low",), None])
def test_bad_levels(levels):
    with pytest.raises(InputError, match=r"`levels` must be numbers in \(0, 1\) in increasing order"):
        check_levels(levels)


def test_interval_score_by_its_definition():
    low, high, y = randn(50) - 1, randn(50, seed=1) + 1, 2 * randn(50, seed=2)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    found = interval_score(low, high, y, 0.8)
    for i in range(50):
        expected = high[i] - low[i] + 10 * max(low[i] - y[i], 0) + 10 * max(y[i] - high[i], 0)
        assert found[i].item() == pytest.approx(float(expected))
    # It is the sum of the pinball losses of both bounds, times 2 / alpha.
    pinballs = pinball(low, y, 0.1) + pinball(high, y, 0.9)
    torch.testing.assert_close(found, pinballs * 2 / 0.2)


# ---------------------------------------------------------------------- probability integrals


def test_pit_histogram_is_numpys():
    integral = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    integral[:3] = torch.tensor([0.0, 1.0, 0.5])
    counts = pit_counts(integral, 10)
    assert counts.tolist() == np.histogram(integral.numpy(), 10, (0, 1))[0].tolist()
    known = torch.arange(200) % 3 > 0
    missing = torch.where(known, integral, torch.nan)
    assert torch.equal(pit_counts(missing, 10, known), pit_counts(integral[known], 10))


def test_pit_distance():
    assert pit_distance(torch.tensor([5.0, 5.0])).item() == 0
    assert pit_distance(torch.tensor([8.0, 0.0, 0.0, 0.0])).item() == pytest.approx(0.75)
    assert pit_distance(torch.zeros(4)).isnan()


# ---------------------------------------------------------------------- sparsification


@pytest.mark.parametrize("root", [False, True])
def test_sparsification_by_removing_rows_one_by_one(root):
    uncertainty, error = randn(30).exp(), randn(30, seed=1).square()
    found = sparsification_curve(uncertainty, error, root)
    order = np.argsort(-uncertainty.numpy())
    for k in range(30):
        mean = error.numpy()[order[k:]].mean()
        assert found[k].item() == pytest.approx(math.sqrt(mean) if root else mean)
    best = sparsification_curve(error, error, root)
    expected = ((found - best) / best[0]).mean().item()
    assert ause(uncertainty, error, root).item() == pytest.approx(expected)


def test_sparsification_of_ties_is_the_mean_over_their_orders():
    uncertainty, error = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 3.0, 6.0])
    assert sparsification_curve(uncertainty, error).tolist() == pytest.approx([3.0, 1.5, 1.5])


def test_ause_is_zero_for_the_best_ranking_and_invariant():
    uncertainty, error = randn(25).exp(), randn(25, seed=1).abs()
    assert ause(error, error).item() == 0
    assert ause(3 * error + 1, error).item() == pytest.approx(0, abs=1e-12)
    assert ause(uncertainty.log(), 7 * error).item() == pytest.approx(ause(uncertainty, error).item())
    assert ause(uncertainty, 0 * error).item() == 0
    assert ause(uncertainty[:0], error[:0]).isnan()


def test_sparsification_refuses_other_shapes_and_nan():
    with pytest.raises(InputError, match=r"must have one shape \[N\], but their shapes are \[3\] and \[2\]"):
        sparsification_curve(torch.zeros(3), torch.zeros(2))
    with pytest.raises(InputError, match="`uncertainty` must hold numbers"):
        ause(torch.tensor([NAN, 1.0]), torch.zeros(2))


# ---------------------------------------------------------------------- targets


def test_a_target_may_lack_its_last_axis_alone():
    assert aligned_target(torch.zeros(5), torch.Size([5, 1])).shape == (5, 1)
    assert aligned_target(torch.zeros(5, 4), torch.Size([5, 4, 1])).shape == (5, 4, 1)
    for target, shape in (((5, 1), (5, 2)), ((5,), (5, 2)), ((5, 1), (5, 1, 1, 1)), ((1, 5), (5, 1))):
        with pytest.raises(InputError, match="`target` must have shape .*would broadcast"):
            aligned_target(torch.zeros(target), torch.Size(shape))


def test_joint_densities_leave_out_missing_targets():
    target = torch.tensor([[1.0, NAN], [NAN, NAN]])
    value, known = known_targets(target)
    assert value.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    log_prob = torch.from_numpy(stats.norm.logpdf(value.numpy()))
    joint = sum_over_targets(log_prob.unsqueeze(0), known)
    assert joint[0, 0].item() == pytest.approx(stats.norm.logpdf(1.0))
    assert joint[0, 1].isnan()
