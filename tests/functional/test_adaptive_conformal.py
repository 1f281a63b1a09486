"""Adaptive conformal inference: its update, its bound for any stream, and a stream that drifts."""

from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import AdaptiveConformal, conformal_quantile


def test_the_level_follows_the_errors():
    state = AdaptiveConformal(alpha=0.2, step_size=0.1)
    assert state.level == 0.2
    expected = 0.2
    for covered in (True, False, False, True, False, False, False):
        state = state.update(covered)
        expected += 0.1 * (0.2 - (not covered))
        assert state.level == pytest.approx(expected, abs=1e-15)
    assert state.level < 0
    assert state.update(0.25).level == pytest.approx(expected + 0.1 * (0.2 - 0.75), abs=1e-15)


def test_the_threshold_is_the_quantile_at_the_level_and_infinite_beyond_it():
    scores = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AdaptiveConformal(current=0.3).threshold(scores), conformal_quantile(scores, 0.3))
    for level in (-0.01, 0.0):
        assert (AdaptiveConformal(current=level).threshold(scores) == torch.inf).all()
    for level in (1.0, 1.01):
        assert (AdaptiveConformal(current=level).threshold(scores) == -torch.inf).all()


@settings(max_examples=100)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=60),
    st.sampled_from([0.05, 0.1, 0.5, 0.9]),
    st.sampled_from([0.01, 0.1, 1.0]),
)
def test_the_bound_holds_for_any_stream(stream, alpha, step_size):
    state, missed = AdaptiveConformal(alpha, step_size), 0
    for i, score in enumerate(stream):
        covered = score <= state.threshold(torch.tensor(stream[:i], dtype=torch.float64)).item()
        missed += not covered
        state = state.update(covered)
    bound = (max(alpha, 1 - alpha) + step_size) / (step_size * len(stream))
    assert abs(missed / len(stream) - alpha) <= bound + 1e-9


def test_a_drift_is_followed():
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(1, 6, 2000) * torch.randn(2000, generator=generator).abs()
    state, adaptive, fixed = AdaptiveConformal(0.1, 0.02), [], []
    for t in range(200, 2000):
        past = scores[t - 200 : t]
        adaptive.append(bool(scores[t] <= state.threshold(past)))
        fixed.append(bool(scores[t] <= conformal_quantile(scores[:200], 0.1)))
        state = state.update(adaptive[-1])
    assert sum(fixed) / 1800 < 0.7
    assert sum(adaptive) / 1800 == pytest.approx(0.9, abs=0.005)


def test_the_state_is_plain_numbers_and_does_not_change():
    state = AdaptiveConformal(0.1, 0.05).update(False)
    assert {type(value) for value in asdict(state).values()} == {float}
    assert AdaptiveConformal(**asdict(state)) == state
    with pytest.raises(FrozenInstanceError):
        state.current = 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveConformal(alpha=0.0), r"`alpha` must be a number in \(0, 1\)"),
        (lambda: AdaptiveConformal(step_size=0.0), "`step_size` must be positive and finite"),
        (lambda: AdaptiveConformal(current=float("nan")), "`current` must be finite, but it is nan"),
        (lambda: AdaptiveConformal().update(float("nan")), r"`covered` must be a number in \[0, 1\], but it is nan"),
        (lambda: AdaptiveConformal().update(2), r"`covered` must be a number in \[0, 1\]"),
        (lambda: AdaptiveConformal().threshold(torch.tensor([float("nan")])), "`scores` must hold numbers"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
