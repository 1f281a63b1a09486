"""The urn of ranks, and the capital of bets against it, beside their definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.drift import DriftTest, RankBins, bets


def uniforms(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_capital(sizes, bins):
    """The capital by its definition: each bet from each row on, and what still waits."""
    multipliers, weights = bets(sizes)
    urn, capital = sizes.double(), []
    factors = []
    for b in bins.tolist():
        factors.append(multipliers[:, b] / (multipliers @ urn / urn.sum()))
        urn[b] += 1
        t = len(factors)
        total = 1 / math.log2(t + 2)
        for start in range(1, t + 1):
            begins = 1 / math.log2(start + 1) - 1 / math.log2(start + 2)
            total += begins * float((weights * torch.stack(factors[start - 1 :]).prod(0)).sum())
        capital.append(math.log(total))
    return torch.tensor(capital, dtype=torch.float64)


def test_the_definition():
    bins = RankBins.of(uniforms(60, 0))
    places = bins(1 - uniforms(40, 1) ** 2, uniforms(40, 2))
    _, capital = DriftTest.start(bins.sizes).advance(places)
    torch.testing.assert_close(capital, exact_capital(bins.sizes, places), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 30])
def test_the_capital_is_a_martingale_under_the_urn(n):
    sizes = RankBins.of(uniforms(n, 0)).sizes
    test, _ = DriftTest.start(sizes).advance(torch.tensor([0, len(sizes) - 1, 0]))
    urn = (test.sizes + test.counts).double()
    after = torch.stack([test.advance(torch.tensor([b]))[1] for b in range(len(sizes))]).squeeze(1)
    assert float((urn / urn.sum() * after.exp()).sum()) == pytest.approx(math.exp(test.log_capital), rel=1e-12)


def test_bets_are_weights_and_expectations_of_one():
    for n in (1, 3, 50, 5000):
        sizes = RankBins.of(uniforms(n, 0)).sizes
        multipliers, weights = bets(sizes)
        assert int(sizes.sum()) == n + 1
        assert float(weights.sum()) == pytest.approx(1)
        assert bool((multipliers > 0).all())
        shares = sizes.double() / sizes.sum()
        torch.testing.assert_close(multipliers @ shares, torch.ones(len(weights), dtype=torch.float64))


def test_the_urn_gives_the_probabilities_of_every_order():
    """Of 4 calibration and 2 stream scores in every order, each pair of intervals comes as often as the urn says."""
    ranks = list(itertools.permutations(range(6)))
    found = {}
    for order in ranks:
        calibration, stream = torch.tensor(order[:4]).double(), torch.tensor(order[4:]).double()
        bins = RankBins.of(calibration)
        pair = tuple(bins(stream, torch.full((2,), 0.5)).tolist())
        found[pair] = found.get(pair, 0) + 1
    sizes = RankBins.of(torch.arange(4.0)).sizes.double()
    for (one, other), count in found.items():
        second = (sizes[other] + (one == other)) / 6
        assert count / len(ranks) == pytest.approx(float(sizes[one] / 5 * second))


def test_ties_keep_the_probabilities():
    """Scores of three values alone: the bins of rows in distribution come as often as their sizes say."""
    draw = torch.Generator().manual_seed(0)
    counts, sizes = 0, None
    for _ in range(1500):
        scores = torch.randint(3, (80,), generator=draw).double()
        bins = RankBins.of(scores[:60])
        counts = counts + torch.bincount(bins(scores[60:], torch.rand(20, generator=draw)), minlength=len(bins.sizes))
        sizes = bins.sizes
    expected = sizes.double() / sizes.sum() * 1500 * 20
    # Rows of one draw share their calibration rows: the variance is (1 + 19 / 62) times a multinomial's at most.
    assert bool(((counts - expected).abs() < 4.5 * (1.31 * expected).sqrt()).all())


@pytest.mark.parametrize("scale", [1.0, -1e4, 1e-50])
def test_scores_that_differ_in_the_last_digits_alone_are_equal(scale):
    """As the shares of votes in float64 and in float32 do."""
    votes = torch.randint(2, 11, (400,), generator=torch.Generator().manual_seed(0)) / torch.tensor(10.0).double()
    exact = scale * (1 - votes)
    bins, ties = RankBins.of(exact[:100]), torch.rand(300)
    for rounding in (3e-8, -3e-8):
        assert torch.equal(bins(exact[100:] * (1 + rounding), ties), bins(exact[100:], ties))
    edge = torch.tensor([0.5 * scale], dtype=torch.float64)
    apart = edge * torch.tensor([0.9999, 1.0001])
    assert sorted(RankBins.of(edge)(apart, torch.full((2,), 0.5)).tolist()) == [0, 1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 20))
def test_batches_do_not_matter(rows, size):
    start, bins = DriftTest.start(RankBins.of(torch.arange(20.0)).sizes), torch.tensor(rows, dtype=torch.long)
    whole, capital = start.advance(bins)
    test, parts = start, []
    for part in bins.split(size):
        test, one = test.advance(part)
        parts.append(one)
    torch.testing.assert_close(torch.cat(parts) if parts else capital, capital, rtol=1e-10, atol=1e-10)
    assert torch.equal(test.counts, whole.counts)
    assert test.log_capital == pytest.approx(whole.log_capital, abs=1e-10)


def test_streams_without_a_drift_rarely_raise_an_alarm():
    alarms = 0
    for seed in range(300):
        scores = uniforms(2200, seed)
        bins = RankBins.of(scores[:200])
        _, capital = DriftTest.start(bins.sizes).advance(bins(scores[200:], torch.full((2000,), 0.5)))
        alarms += bool((capital >= math.log(20)).any())
    assert alarms <= 0.05 * 300 + 2 * math.sqrt(0.05 * 0.95 * 300)


@pytest.mark.parametrize("power", [8.0, 1 / 8])
def test_a_late_drift_is_found_in_either_direction(power):
    delays = []
    for seed in range(20):
        scores = uniforms(6500, seed)
        other = (1 - uniforms(1000, 1000 + seed)) ** (1 / power)  # towards 1 or 0
        mixed = torch.where(uniforms(1000, 2000 + seed) < 0.2, other, scores[5500:])
        bins = RankBins.of(scores[:500])
        _, capital = DriftTest.start(bins.sizes).advance(
            bins(torch.cat([scores[500:5500], mixed]), torch.full((6000,), 0.5))
        )
        rows = (capital >= math.log(20)).nonzero()
        delays.append(int(rows[0]) - 5000 if len(rows) else 10**9)
    assert sorted(delays)[10] < 500


def test_a_long_stream_stays_finite():
    bins = RankBins.of(uniforms(300, 0))
    test, capital = DriftTest.start(bins.sizes).advance(bins(uniforms(200_000, 1), torch.full((200_000,), 0.5)))
    assert bool(capital.isfinite().all())
    assert bool((capital < math.log(20)).all())
    test, capital = test.advance(torch.zeros(20_000, dtype=torch.long))
    assert bool(capital.isfinite().all())
    assert test.log_capital > 100


def test_nan_is_the_highest_score():
    bins = RankBins.of(torch.arange(100.0))
    assert bins(torch.tensor([math.nan, math.inf, -math.inf]), torch.full((3,), 0.5)).tolist() == [
        0,
        0,
        len(bins.sizes) - 1,
    ]


@pytest.mark.parametrize(
    ("scores", "message"),
    [(torch.empty(0), "it is empty"), (torch.tensor([0.0, math.inf]), "1 of 2 scores are infinite or NaN")],
)
def test_errors(scores, message):
    with pytest.raises(InputError, match=f"`calibration` must hold finite scores, at least one, but {message}"):
        RankBins.of(scores)
