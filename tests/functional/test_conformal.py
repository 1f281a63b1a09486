"""The conformal quantile against its definition, exact ranks, and coverage over resplits, within groups and under a covariate shift."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import conformal_quantile, group_quantiles, weighted_conformal_quantile

ALPHAS = [0.0, 0.01, 0.05, 0.07, 0.1, 1 - 0.9, 0.3, 1 / 3, 0.5, 0.9, 1 - 0.1, 1.0]


def fraction(alpha):
    return Fraction(alpha).limit_denominator(1000)


def by_definition(scores, weights, new_weight, alpha):
    """The smallest value with enough weight at or below it, in exact arithmetic."""
    if fraction(alpha) == 1:
        return -math.inf
    total = sum(weights) + new_weight
    for value in sorted(scores):
        if sum(w for s, w in zip(scores, weights, strict=True) if s <= value) >= (1 - fraction(alpha)) * total:
            return float(value)
    return math.inf


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 3), max_size=25), st.sampled_from(ALPHAS))
def test_the_quantile_is_its_definition(scores, alpha):
    found = conformal_quantile(torch.tensor(scores, dtype=torch.float32), alpha)
    assert found.item() == by_definition(scores, [1] * len(scores), 1, alpha)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5)), min_size=1, max_size=20),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(ALPHAS),
)
def test_the_weighted_quantile_is_its_definition(rows, new, alpha):
    scores, weights = zip(*rows, strict=True)
    found = weighted_conformal_quantile(
        torch.tensor(scores).double(), torch.tensor(weights).double(), torch.tensor(new).double(), alpha
    )
    assert found.tolist() == [by_definition(scores, weights, w, alpha) for w in new]


def test_ranks_are_exact():
    for num in range(1, 120):
        ranks = torch.arange(1.0, num + 1)
        for percent in range(1, 100):
            expected = -(-(num + 1) * (100 - percent) // 100)
            for alpha in (percent / 100, 1 - (100 - percent) / 100):
                found = conformal_quantile(ranks, alpha).item()
                assert found == (expected if expected <= num else math.inf), (num, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("weight", [1.0, 0.1, 1e-30, 1e30])
def test_equal_weights_give_the_unweighted_quantile(weight, alpha):
    for num in range(1, 60):
        scores = torch.randn(num, generator=torch.Generator().manual_seed(num))
        weights = torch.full((num,), weight, dtype=torch.float64)
        expected = conformal_quantile(scores, alpha)
        assert weighted_conformal_quantile(scores, weights, weights[:1], alpha).tolist() == [expected]


def test_few_rows_have_an_infinite_threshold():
    assert conformal_quantile(torch.zeros(8), 0.1) == math.inf
    assert conformal_quantile(torch.zeros(9), 0.1) == 0
    assert conformal_quantile(torch.zeros(0), 0.1) == math.inf
    assert conformal_quantile(torch.zeros(0), 1.0) == -math.inf
    assert conformal_quantile(torch.zeros(1000), 0.0) == math.inf
    assert torch.equal(conformal_quantile(torch.zeros(0, 2, 3), 0.1), torch.full((2, 3), math.inf).double())


def test_each_position_has_its_own_quantile():
    scores = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    found = conformal_quantile(scores, 0.2)
    assert found.shape == (3, 2)
    assert all(found[h, d] == conformal_quantile(scores[:, h, d], 0.2) for h in range(3) for d in range(2))


def test_order_is_irrelevant_and_infinite_scores_are_kept():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(40, generator=torch.Generator().manual_seed(2))
    assert conformal_quantile(scores[order], 0.1) == conformal_quantile(scores, 0.1)
    new = torch.tensor([0.5, 3.0])
    expected = weighted_conformal_quantile(scores, weights, new, 0.1)
    assert torch.equal(weighted_conformal_quantile(scores[order], weights[order], new, 0.1), expected)
    assert torch.equal(weighted_conformal_quantile(scores, 8 * weights, 8 * new, 0.1), expected)
    assert conformal_quantile(torch.tensor([0.0, math.inf, math.inf]), 0.5) == math.inf
    assert conformal_quantile(torch.tensor([0.0, -math.inf, math.inf]), 0.5) == 0


@pytest.mark.parametrize("num", [999, 500, 19])
def test_coverage_over_resplits(num):
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2000, generator=generator).exp()
    splits = torch.stack([pool[torch.randperm(2000, generator=generator)] for _ in range(1000)], 1)
    covered = (splits[num:] <= conformal_quantile(splits[:num], 0.1)).double().mean(0)
    assert covered.mean().item() == pytest.approx(math.ceil(0.9 * (num + 1)) / (num + 1), abs=0.003)


def test_coverage_holds_in_each_group():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(3).repeat_interleave(torch.tensor([99, 199, 499]))
    scale = torch.tensor([1.0, 5.0, 0.2])
    covered = torch.zeros(3)
    for _ in range(300):
        scores = scale[groups] * torch.randn(len(groups), generator=generator).abs()
        found = group_quantiles(scores, groups, 3, 0.1)
        assert found.tolist() == [conformal_quantile(scores[groups == g], 0.1) for g in range(3)]
        fresh = scale * torch.randn(500, 3, generator=generator).abs()
        covered += (fresh <= found).float().mean(0) / 300
    np.testing.assert_allclose(covered, 0.9, atol=0.006)


def test_groups_without_rows_and_groups_of_arrays():
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(30) % 2
    found = group_quantiles(scores, groups, 3, 0.2)
    assert torch.equal(found[1], conformal_quantile(scores[1::2], 0.2))
    assert torch.equal(found[2], torch.full((4,), math.inf).double())
    assert found[groups].shape == scores.shape


def test_weights_restore_the_coverage_under_a_covariate_shift():
    generator = torch.Generator().manual_seed(0)
    plain = weighted = 0.0
    for _ in range(300):
        x = torch.rand(300, generator=generator)
        scores = (x * torch.randn(300, generator=generator)).abs()
        shifted = torch.rand(300, generator=generator).sqrt()  # the density 2 x
        fresh = (shifted * torch.randn(300, generator=generator)).abs()
        plain += (fresh <= conformal_quantile(scores, 0.1)).float().mean().item() / 300
        weighted += (fresh <= weighted_conformal_quantile(scores, x, shifted, 0.1)).float().mean().item() / 300
    assert plain < 0.87
    assert weighted == pytest.approx(0.9, abs=0.008)


def test_without_any_weight_the_threshold_is_infinite():
    assert weighted_conformal_quantile(torch.zeros(3), torch.zeros(3), torch.zeros(1), 0.5).tolist() == [math.inf]
    assert weighted_conformal_quantile(torch.zeros(0), torch.zeros(0), torch.ones(2), 0.5).tolist() == [math.inf] * 2


SCORES = torch.zeros(3)
NAN = torch.tensor([0.0, float("nan"), 1.0])
NEW = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_quantile(NAN, 0.1), "`scores` must hold numbers, but it holds NaN"),
        (lambda: conformal_quantile(NAN.long(), 0.1), r"`scores` must be a floating-point tensor \[N, ...\]"),
        (lambda: conformal_quantile(SCORES, 10), r"`alpha` must be a number in \[0, 1\], but it is 10"),
        (lambda: conformal_quantile(SCORES, float("nan")), r"`alpha` must be a number in \[0, 1\]"),
        (lambda: conformal_quantile(SCORES, True), r"`alpha` must be a number in \[0, 1\]"),
        (
            lambda: group_quantiles(SCORES, torch.tensor([0, 1, 2]), 2, 0.1),
            r"`groups` must hold class indices in \[0, 2\)",
        ),
        (lambda: group_quantiles(SCORES, torch.zeros(3), 2, 0.1), "`groups` must hold class indices of an integer"),
        (lambda: group_quantiles(SCORES, torch.tensor([0]), 2, 0.1), r"`groups` must have shape \[3\]"),
        (lambda: group_quantiles(NAN, torch.tensor([0, 0, 1]), 2, 0.1), "`scores` must hold numbers"),
        (lambda: weighted_conformal_quantile(NAN, SCORES, NEW, 0.1), "`scores` must hold numbers"),
        (lambda: weighted_conformal_quantile(SCORES, NAN, NEW, 0.1), "`weights` must be finite and non-negative"),
        (
            lambda: weighted_conformal_quantile(SCORES, SCORES - 1, NEW, 0.1),
            "`weights` must be finite and non-negative",
        ),
        (lambda: weighted_conformal_quantile(SCORES, SCORES, NEW / 0, 0.1), "`new_weights` must be finite"),
        (lambda: weighted_conformal_quantile(SCORES, NEW, NEW, 0.1), r"`weights` must have shape \[3\]"),
        (lambda: weighted_conformal_quantile(SCORES, SCORES, NEW, -0.1), r"`alpha` must be a number in \[0, 1\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
