"""P-values, thresholds of alarms, and Benjamini-Hochberg, beside their definitions and scipy's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional import alarm_threshold, benjamini_hochberg, conformal_p_values
from lightning_uq.functional.conformal_p_values import p_values_among

scores_of = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(scores_of, scores_of)
def test_the_definition_with_ties(calibration, scores):
    expected = [(1 + sum(one >= score for one in calibration)) / (len(calibration) + 1) for score in scores]
    assert conformal_p_values(torch.tensor(scores), torch.tensor(calibration)).tolist() == pytest.approx(
        expected, rel=1e-15
    )


def test_the_graph_gives_what_eager_code_gives():
    calibration, scores = torch.randn(1000).double().sort().values, torch.randn(50, 3)
    scores[0, 0], scores[1, 0], scores[2, 0] = math.inf, math.nan, calibration[500]

    class Model(torch.nn.Module):
        def forward(self, x):
            return p_values_among(x, calibration)

    batch = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(Model(), (scores,), dynamic_shapes=batch, strict=False).module()
    for part in (scores, scores[:1], scores[:7]):
        assert torch.equal(graph(part), conformal_p_values(part, calibration))
    assert "searchsorted" not in str(graph.graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinite_and_nan_scores_have_the_smallest_p_value(dtype):
    scores = torch.tensor([math.inf, math.nan, -math.inf], dtype=dtype)
    p = conformal_p_values(scores, torch.arange(9.0))
    assert (p.tolist(), p.dtype) == ([0.1, 0.1, 1.0], torch.float64)


@settings(max_examples=60, deadline=None)
@given(scores_of, st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.9]))
def test_a_score_exceeds_the_threshold_exactly_where_its_p_value_is_at_most_the_rate(calibration, rate):
    ordered = torch.tensor(calibration).sort().values
    scores = torch.linspace(-3, 4, 141)
    assert torch.equal(scores > alarm_threshold(ordered, rate), conformal_p_values(scores, ordered) <= rate + 1e-12)


@pytest.mark.parametrize(
    ("n", "rate", "delta"), [(44, 0.05, 0.1), (45, 0.05, 0.1), (1000, 0.05, 0.1), (5000, 0.01, 0.05), (300, 0.5, 0.01)]
)
def test_the_conditional_threshold_is_the_lowest_with_its_probability(n, rate, delta):
    threshold = float(alarm_threshold(torch.arange(1.0, n + 1), rate, delta))
    rank = 0 if math.isinf(threshold) else n + 1 - int(threshold)
    # The share of new scores above the k-th highest of n is Beta(k, n + 1 - k) distributed.
    assert rank == 0 or stats.beta(rank, n + 1 - rank).sf(rate) <= delta
    assert rank == n or stats.beta(rank + 1, n - rank).sf(rate) > delta


def test_the_share_of_false_alarms_exceeds_the_rate_as_often_as_delta_says():
    draw = torch.Generator().manual_seed(0)
    shares = torch.stack([1 - alarm_threshold(torch.rand(400, generator=draw), 0.1, 0.2) for _ in range(2000)])
    k = next(k for k in range(400, 0, -1) if stats.beta(k, 401 - k).sf(0.1) <= 0.2)
    expected = stats.beta(k, 401 - k).sf(0.1)
    assert float((shares > 0.1).double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.2 * 0.8 / 2000))
    assert expected <= 0.2


def test_too_few_rows_give_no_finite_threshold():
    assert alarm_threshold(torch.rand(18), 0.05).isposinf()
    assert alarm_threshold(torch.rand(19), 0.05).isfinite()
    assert alarm_threshold(torch.rand(44), 0.05, 0.1).isposinf()
    assert alarm_threshold(torch.rand(45), 0.05, 0.1).isfinite()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.05, 0.1, 0.3]))
def test_benjamini_hochberg_beside_scipy(p_values, rate):
    adjusted = stats.false_discovery_control(p_values)
    found = benjamini_hochberg(torch.tensor(p_values, dtype=torch.float64), rate)
    clear = abs(adjusted - rate) > 1e-9
    assert (found.numpy() == (adjusted <= rate))[clear].all()


def test_the_rate_of_false_discoveries_of_conformal_p_values():
    draw = torch.Generator().manual_seed(0)
    rates, powers = [], []
    for _ in range(400):
        calibration = torch.randn(500, generator=draw).sort().values
        scores = torch.randn(100, generator=draw) + torch.cat([torch.zeros(80), torch.full((20,), 4.0)])
        found = benjamini_hochberg(conformal_p_values(scores, calibration), 0.2)
        rates.append(float(found[:80].sum()) / max(1, int(found.sum())))
        powers.append(float(found[80:].double().mean()))
    rates = torch.tensor(rates)
    # The procedure's own rate is 0.2 * 80 / 100 for independent p-values.
    assert float(rates.mean()) <= 0.16 + 3 * float(rates.std()) / 20
    assert sum(powers) / len(powers) > 0.9


def test_nothing_is_found_among_no_rows():
    assert benjamini_hochberg(torch.empty(0), 0.1).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alarm_threshold(torch.rand(9), 1.0), r"`false_alarm_rate` must be a number in \(0, 1\)"),
        (lambda: alarm_threshold(torch.rand(9), 0.1, 0.0), r"`delta` must be a number in \(0, 1\)"),
        (lambda: alarm_threshold(torch.tensor([math.nan]), 0.1), "`calibration` must hold numbers, but it holds NaN"),
        (lambda: benjamini_hochberg(torch.tensor([1.5]), 0.1), r"`p_values` must be a number in \[0, 1\]"),
        (lambda: conformal_p_values(torch.tensor([1]), torch.rand(3)), "`score` must be a floating-point tensor"),
        (lambda: conformal_p_values(torch.rand(2), torch.tensor([math.nan])), "`calibration` must hold numbers"),
        (lambda: conformal_p_values(torch.rand(2), torch.rand(3, 1)), r"`calibration` must have shape \[3\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
