"""Tails of held-out scores, and the coordinates in which features are scored."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import coordinates_of, transform_features
from lightning_uq.functional.tail import fit_tail, tail_score


@pytest.mark.parametrize("num", [2, 7, 200, 5000])
def test_it_is_minus_the_log_of_the_share_that_is_as_high(num):
    scores = torch.randn(num, generator=torch.Generator().manual_seed(num), dtype=torch.float64)
    fit = fit_tail(scores)
    found = tail_score(scores, fit)
    share = (scores[None] >= scores[:, None]).double().sum(1) / (num + 1)
    torch.testing.assert_close(found, -share.log(), rtol=0.02, atol=0.02)  # between knots it is linear
    highest = scores.amax()
    assert float(tail_score(highest, fit)) == pytest.approx(math.log(num + 1))
    steps = tail_score(highest + torch.tensor([1.0, 2.0, 3.0]), fit).diff()
    torch.testing.assert_close(steps[0], steps[1])  # linear beyond
    assert steps[0] > 0


def test_an_exponential_tail_goes_on_as_it_is():
    scores = -torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log() / 3
    slope = float(fit_tail(scores).slopes[-1])
    assert slope == pytest.approx(3, rel=0.05)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50), st.floats(-2e6, 2e6), st.floats(-2e6, 2e6))
def test_it_never_falls(scores, a, b):
    fit = fit_tail(torch.tensor(scores, dtype=torch.float64))
    low, high = tail_score(torch.tensor(sorted([a, b]), dtype=torch.float64), fit)
    assert low <= high
    assert low >= 0


def test_ties_infinity_and_nan():
    fit = fit_tail(torch.tensor([1.0, 1.0, 1.0, 2.0, math.inf, math.nan]))
    assert fit.knots.tolist() == [1.0, 2.0]
    torch.testing.assert_close(fit.values.exp(), torch.tensor([5 / 4, 5.0], dtype=torch.float64))
    found = tail_score(torch.tensor([math.inf, -math.inf, math.nan]), fit)
    assert found[0] == math.inf
    assert found[1] == fit.values[0]
    assert found[2].isnan()
    assert tail_score(torch.tensor(9.0), fit_tail(torch.ones(5))).isfinite()
    with pytest.raises(InputError, match="at least two finite scores, but there are 1 of 2"):
        fit_tail(torch.tensor([1.0, math.nan]))


def test_a_graph_gives_the_same():
    fit = fit_tail(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    scores = torch.linspace(-5, 9, 70, dtype=torch.float64)

    class Tail(torch.nn.Module):
        def forward(self, x):
            return tail_score(x, fit)

    exported = torch.export.export(Tail(), (scores,)).module()
    torch.testing.assert_close(exported(scores), tail_score(scores, fit))


@given(st.integers(0, 10**6), st.floats(-8, 8))
def test_polar_coordinates_hold_the_length_and_the_direction(seed, power):
    f = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    polar, scaled = transform_features(f, "polar"), transform_features(10**power * f, "polar")
    torch.testing.assert_close(polar[:, :4], f / f.norm(dim=1, keepdim=True))
    torch.testing.assert_close(polar[:, 4].expm1(), f.norm(dim=1))
    torch.testing.assert_close(scaled[:, :4], polar[:, :4])
    assert torch.equal(transform_features(f, "direction"), polar[:, :4])
    assert transform_features(f, "raw") is f


def test_a_few_zero_vectors_do_not_set_the_scale_of_all_lengths():
    """Rectifiers make some: the log of their length would be a variance of its own."""
    from lightning_uq.functional.ood import auroc
    from lightning_uq.networks.density import GaussianDensity

    generator = torch.Generator().manual_seed(0)
    train, test = (3 + torch.randn(1000, 6, generator=generator) for _ in range(2))
    train[:20] = 0
    density = GaussianDensity.fit_features(transform_features(train, "polar"), torch.zeros(1000, dtype=torch.long))
    scores = [density.score(transform_features(x, "polar")) for x in (test, 3 * test)]
    assert float(auroc(torch.cat(scores), torch.arange(2000) >= 1000)) > 0.95


def test_edges_of_the_coordinates():
    f = torch.tensor([[0.0, 0.0], [3e38, 3e38], [math.nan, 0.0]])
    polar = transform_features(f, "polar")
    assert polar[0].tolist() == [0.0, 0.0, 0.0]
    assert bool(polar[1:].isnan().all(1).all())  # a length that overflows raises the alarm
    assert transform_features(torch.ones(2, 3, dtype=torch.bfloat16), "polar").dtype == torch.float64
    assert coordinates_of("combined") == coordinates_of("auto") == ("raw", "polar")
    assert coordinates_of("direction") == ("direction",)
