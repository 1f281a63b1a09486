"""Intervals against their definitions, and their coverage over resplits, within groups and over horizons."""

import math

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional import conformal_interval, conformal_quantile, group_quantiles, interval_excess


def regression(num, horizon=1, seed=0):
    """Means, standard deviations and quantiles that are wrong, and targets, [N, H, 1] in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num, horizon, 1, generator=generator, dtype=torch.float64)
    noise = (0.2 + x) * torch.randn(num, horizon, 1, generator=generator, dtype=torch.float64)
    mean, std = x.sin() + 0.1, 0.5 + x
    return mean, std, x.sin() - 0.3 - x, x.sin() + 0.5, x.sin() + noise


METHODS = {
    "absolute": lambda mean, std, low, high: (mean, mean, None),
    "normalized": lambda mean, std, low, high: (mean, mean, std),
    "cqr": lambda mean, std, low, high: (low, high, None),
}


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_their_definitions(method):
    *outputs, target = regression(20)
    mean, std, low, high = outputs
    lower, upper, scale = METHODS[method](*outputs)
    expected = {
        "absolute": (target - mean).abs(),
        "normalized": (target - mean).abs() / std,
        "cqr": torch.maximum(low - target, target - high),
    }[method]
    assert torch.equal(interval_excess(lower, upper, target, scale), expected)


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.7, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_an_interval_holds_the_targets_whose_score_is_at_most_the_threshold(method, threshold):
    *outputs, target = regression(500)
    lower, upper, scale = METHODS[method](*outputs)
    low, high = conformal_interval(lower, upper, threshold, scale)
    inside = (low <= target) & (target <= high)
    assert torch.equal(inside, interval_excess(lower, upper, target, scale) <= threshold)
    assert not (low.isnan() | high.isnan()).any()


@pytest.mark.parametrize("method", METHODS)
def test_coverage_over_resplits(method):
    *outputs, target = regression(2000)
    lower, upper, scale = METHODS[method](*outputs)
    scores = interval_excess(lower, upper, target, scale).flatten()
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for _ in range(1000):
        order = torch.randperm(2000, generator=generator)
        new = order[999:]
        threshold = conformal_quantile(scores[order[:999]], 0.1)
        low, high = conformal_interval(lower[new], upper[new], threshold, None if scale is None else scale[new])
        total += ((low <= target[new]) & (target[new] <= high)).double().mean().item() / 1000
    assert total == pytest.approx(0.9, abs=0.003)


def test_groups():
    mean, _, _, _, target = regression(4000)
    groups = (target[:, 0, 0].sign() > 0).long() + 2 * (torch.arange(4000) % 2)
    scores = interval_excess(mean, mean, target)
    thresholds = group_quantiles(scores[:2000], groups[:2000], 4, 0.1)
    low, high = conformal_interval(mean[2000:], mean[2000:], thresholds[groups[2000:]])
    covered = ((low <= target[2000:]) & (target[2000:] <= high)).flatten().float()
    for group in range(4):
        assert covered[groups[2000:] == group].mean().item() == pytest.approx(0.9, abs=0.05)


def test_bands_over_a_horizon():
    mean, std, _, _, target = regression(4000, horizon=5)
    scores = interval_excess(mean, mean, target, std)
    steps = conformal_quantile(scores[:2000], 0.1)
    whole = conformal_quantile(scores[:2000].amax(1), 0.1)
    assert (steps.shape, whole.shape) == ((5, 1), (1,))
    covered = []
    for threshold in (steps, whole):
        low, high = conformal_interval(mean[2000:], mean[2000:], threshold, std[2000:])
        covered.append(((low <= target[2000:]) & (target[2000:] <= high)).double())
    torch.testing.assert_close(covered[0].mean(0), torch.full((5, 1), 0.9).double(), atol=0.03, rtol=0)
    assert covered[0].amin(1).mean().item() < 0.75
    assert covered[1].amin(1).mean().item() == pytest.approx(0.9, abs=0.03)


def test_scores_shift_and_scale_with_the_targets():
    mean, std, low, high, target = regression(50)
    expected = interval_excess(low, high, target)
    torch.testing.assert_close(interval_excess(low + 3, high + 3, target + 3), expected)
    torch.testing.assert_close(interval_excess(2 * low, 2 * high, 2 * target), 2 * expected)
    torch.testing.assert_close(
        interval_excess(2 * mean, 2 * mean, 2 * target, 2 * std), interval_excess(mean, mean, target, std)
    )
    torch.testing.assert_close(interval_excess(-high, -low, -target), expected)


def test_a_narrowed_interval_may_be_empty():
    low, high = conformal_interval(torch.zeros(1), torch.ones(1), -0.6)
    assert low > high


def test_edges():
    assert interval_excess(torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0)).shape == (0, 1)
    assert interval_excess(torch.zeros(3, 1), torch.zeros(3, 1), torch.ones(3)).dtype == torch.float64
    low, high = conformal_interval(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 1.0, math.inf]))
    assert high[0].tolist() == [1.0, 2.0, math.inf]
    assert low[1].tolist() == [0.0, -1.0, -math.inf]


ZERO = torch.zeros(2, 3)
NAN = torch.full((2, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval_excess(ZERO, ZERO, NAN), "`target` must be finite, but it holds NaN or infinity. Leave out"),
        (lambda: interval_excess(NAN, ZERO, ZERO), "`lower` must be finite"),
        (lambda: interval_excess(ZERO, NAN, ZERO), "`upper` must be finite"),
        (lambda: interval_excess(ZERO, ZERO, ZERO, ZERO), "`scale` must be positive and finite"),
        (lambda: interval_excess(ZERO, ZERO, ZERO, NAN), "`scale` must be positive and finite"),
        (lambda: interval_excess(ZERO, ZERO, ZERO, 1 + ZERO[:, :1]), r"`scale` must have shape \[2, 3\]"),
        (lambda: interval_excess(ZERO, ZERO[:1], ZERO), r"`upper` must have shape \[2, 3\]"),
        (lambda: interval_excess(ZERO, ZERO, ZERO[:1]), r"`target` must have shape \[2, 3\]"),
        (lambda: conformal_interval(ZERO, ZERO, math.nan), "`threshold` must hold numbers"),
        (lambda: conformal_interval(ZERO, ZERO, torch.zeros(2)), "`threshold` must broadcast to the shape of the bounds"),
        (lambda: conformal_interval(ZERO, ZERO, torch.zeros(1, 2, 3)), "`threshold` must broadcast"),
        (lambda: conformal_interval(ZERO[:1], ZERO[:1], ZERO), "`threshold` must broadcast"),
        (lambda: conformal_interval(ZERO, NAN, 1.0), "`upper` must be finite"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
