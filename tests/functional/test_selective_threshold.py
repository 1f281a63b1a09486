"""The selective threshold: binomial tails, the best threshold that passes, and how often its risk is too high."""

import math

import pytest
import torch
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional import selective_threshold
from lightning_uq.functional.selective_threshold import binomial_cdf


@pytest.mark.parametrize("num", [0, 1, 7, 400, 200_000])
@pytest.mark.parametrize("probability", [1e-6, 0.01, 0.3, 0.99])
def test_binomial_tails(num, probability):
    for count in {0, num // 100, num // 3, num}:
        expected = stats.binom.cdf(count, num, probability)
        assert binomial_cdf(count, num, probability) == pytest.approx(expected, rel=1e-7, abs=1e-290)


@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_candidate_that_passes_is_taken(ties):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    if ties:
        confidence = (8 * confidence).floor() / 8
    error = torch.rand(500, generator=generator) > confidence
    ordered = sorted(confidence.tolist(), reverse=True)
    passing = [math.inf]
    for level in range(1, 33):
        rank = math.ceil(level * 500 / 32)
        threshold = ordered[rank] if rank < 500 else -math.inf
        wrong = error[confidence > threshold]
        if stats.binom.cdf(int(wrong.sum()), len(wrong), 0.4) <= 0.1 / 32:
            passing.append(threshold)
    assert len(passing) > 1
    assert selective_threshold(confidence, error, risk=0.4) == min(passing)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("grid", [None, 5])
def test_the_risk_is_exceeded_in_few_draws(sharpness, grid):
    """With sharpness 0 the risk of any threshold is 0.201, just above the target: each finite threshold is a failure."""
    generator = torch.Generator().manual_seed(0)

    def draw(num):
        score = torch.rand(num, generator=generator, dtype=torch.float64)
        error = torch.rand(num, generator=generator) < (0.201 if sharpness == 0 else (1 - score) ** sharpness)
        return score if grid is None else (grid * score).floor(), error

    pool_score, pool_error = draw(100_000)
    failures = answered = 0
    for _ in range(300):
        threshold = selective_threshold(*draw(400), risk=0.2, delta=0.1)
        chosen = pool_score > threshold
        answered += chosen.double().mean().item() / 300
        failures += bool(sharpness == 0 and threshold < math.inf) or bool(
            sharpness and chosen.any() and pool_error[chosen].double().mean() > 0.2
        )
    assert failures <= 45  # of 300; a right share of .1 exceeds it in one of 400 tries
    assert (answered > 0.04) == (sharpness > 0)


def test_everything_is_answered_where_no_row_is_wrong_and_nothing_where_few_are_known():
    assert selective_threshold(torch.rand(500), torch.zeros(500), risk=0.05) == -math.inf
    assert selective_threshold(torch.rand(20), torch.zeros(20), risk=0.05) == math.inf
    assert selective_threshold(torch.rand(0), torch.zeros(0), risk=0.05) == math.inf
    assert selective_threshold(torch.rand(500), torch.ones(500), risk=0.5) == math.inf
    assert selective_threshold(torch.zeros(500), torch.zeros(500), risk=0.05) == -math.inf


def test_order_scale_and_dtype_are_irrelevant():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(300, generator=generator)
    error = torch.rand(300, generator=generator) > confidence
    order = torch.randperm(300, generator=generator)
    expected = selective_threshold(confidence, error, risk=0.3)
    assert expected.isfinite()
    assert selective_threshold(confidence[order], error[order].float(), risk=0.3) == expected
    assert selective_threshold(8 * confidence, error, risk=0.3) == 8 * expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, e: selective_threshold(c, e, risk=0.0), r"`risk` must be a number in \(0, 1\)"),
        (lambda c, e: selective_threshold(c, e, risk=0.1, delta=1.0), r"`delta` must be a number in \(0, 1\)"),
        (lambda c, e: selective_threshold(c, e, risk=0.1, num_levels=0), "`num_levels` must be an integer"),
        (lambda c, e: selective_threshold(c / 0, e, risk=0.1), "`confidence` must hold numbers"),
        (lambda c, e: selective_threshold(c, e[:1], risk=0.1), r"`error` must have shape \[3\]"),
        (lambda c, e: selective_threshold(c[None], e, risk=0.1), r"`confidence` must have shape \[3\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.zeros(3), torch.zeros(3))
