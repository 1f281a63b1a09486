"""The temperature from sums over batches against the one from all rows in memory."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import temperature_sums as module
from lightning_uq.functional.temperature import calibrated_nll, fit_temperature
from lightning_uq.functional.temperature_sums import (
    ROWS,
    calibrated_nll_of_sums,
    fit_temperature_to_sums,
    nll_at,
    temperature_sums,
)


def rows(seed, n=200, c=4, signal=2.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), target] += signal * torch.rand(n, generator=generator, dtype=torch.float64)
    return scale * logits, target


def streamed(logits, target, size=37):
    return sum(temperature_sums(x, y) for x, y in zip(logits.split(size), target.split(size), strict=True))[0]


def fitted(fit, *args):
    """The temperature, and the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        T = float(fit(*args))
    return T, [str(one.message).split(" (T =")[0] for one in caught]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12), st.floats(0.0, 8.0), st.floats(-1.5, 2.0))
def test_it_is_the_temperature_of_all_rows(seed, c, signal, decades):
    logits, target = rows(seed, 120, c, signal, 10**decades)
    found, told = fitted(fit_temperature_to_sums, streamed(logits, target))
    expected, as_told = fitted(fit_temperature, logits, target)
    assert found == pytest.approx(expected, rel=1e-7)
    assert told == as_told
    assert calibrated_nll_of_sums(streamed(logits, target)) == pytest.approx(
        float(calibrated_nll(logits, target)), abs=1e-7
    )


@pytest.mark.parametrize("scale", [1e-2, 1e4, 1e8])
def test_far_from_one_it_is_nearly_that_temperature(scale):
    logits, target = rows(0, scale=scale)
    assert float(fit_temperature_to_sums(streamed(logits, target))) == pytest.approx(
        float(fit_temperature(logits, target)), rel=1e-4
    )


@pytest.mark.parametrize(
    "logits",
    [
        10 * torch.eye(3),  # every row right
        -10 * torch.eye(3),  # below chance
        torch.zeros(3, 3),
        torch.zeros(3, 1),
        torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, -math.inf], [3.0, 0.0, 1.0]]),
    ],
)
def test_cases_without_an_optimum_are_told_alike(logits):
    target = torch.arange(3) % logits.shape[1]
    found, told = fitted(fit_temperature_to_sums, streamed(logits, target))
    expected, as_told = fitted(fit_temperature, logits, target)
    assert found == pytest.approx(expected, rel=1e-6)
    assert told == as_told
    assert nll_at(streamed(logits, target), found) == pytest.approx(float(calibrated_nll(logits, target)), abs=1e-7)


def test_an_optimum_out_of_reach_is_told():
    logits, target = rows(0, scale=1e-6)
    with pytest.warns(UserWarning, match=r"it lies outside \[2\^-12, 2\^40\], .* \(T = 0.0002441\)"):
        fit_temperature_to_sums(streamed(logits, target))


def test_the_likelihood_is_exact_at_every_node_and_close_in_between():
    logits, target = rows(1, 500)
    sums = streamed(logits, target)
    for T, tolerance in ((1.0, 1e-13), (2.0**-0.5, 1e-13), (1.3, 1e-8), (0.1, 1e-8), (90.0, 1e-8), (1e13, 1e-8)):
        expected = torch.nn.functional.cross_entropy(logits / T, target)
        assert nll_at(sums, T) == pytest.approx(float(expected), rel=tolerance)


def test_groups_have_sums_of_their_own(monkeypatch):
    logits, target = rows(2, 300)
    group = torch.randint(3, (300,), generator=torch.Generator().manual_seed(0))
    sums = temperature_sums(logits, target, group, 4)
    for i in range(3):
        own = temperature_sums(logits[group == i], target[group == i])[0]
        torch.testing.assert_close(sums[i], own, rtol=1e-12, atol=1e-9)
        assert sums[i, ROWS].tolist() == [
            int((group == i).sum()),
            int((logits.argmax(1) != target)[group == i].sum()),
            int((target == 0)[group == i].sum()),
        ]
    assert not sums[3].any()
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 50)
    torch.testing.assert_close(temperature_sums(logits, target, group, 4), sums, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_upcast(dtype):
    logits, target = rows(3)
    logits = logits.to(dtype)
    assert torch.equal(temperature_sums(logits, target), temperature_sums(logits.double(), target))


def test_bad_rows_are_named():
    logits, target = rows(4, 10)
    with pytest.raises(InputError, match="`logits` must hold no NaN"):
        temperature_sums(logits.index_fill(0, torch.tensor([1]), math.nan), target)
    with pytest.raises(InputError, match=r"class indices in \[0, 4\)"):
        temperature_sums(logits, target + 1)
