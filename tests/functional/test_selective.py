"""Selective prediction against enumeration of all orders of tied rows, and against closed forms."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import augrc, aurc, auroc, certainty, generalized_risk_curve, risk_coverage_curve


def orders(confidence):
    """All orders of the rows in which confidence does not rise."""
    rows = range(len(confidence))
    return [
        p for p in itertools.permutations(rows) if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(p))
    ]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_expectation_over_the_order_of_ties(rows):
    confidence, error = [c for c, _ in rows], [float(e) for _, e in rows]
    size = len(rows)
    curves = []
    for order in orders(confidence):
        curves.append(np.cumsum([error[i] for i in order]))
    errors = np.mean(curves, 0)
    c, e = torch.tensor(confidence, dtype=torch.float32), torch.tensor(error).bool()
    coverage, risk = risk_coverage_curve(c, e)
    np.testing.assert_allclose(coverage, np.arange(1, size + 1) / size)
    np.testing.assert_allclose(risk, errors / np.arange(1, size + 1), atol=1e-12)
    assert aurc(c, e).item() == pytest.approx(np.mean(errors / np.arange(1, size + 1)))
    expected = np.trapezoid(np.concatenate([[0], errors]) / size, dx=1 / size)
    assert augrc(c, e).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 5, 10**6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_augrc_equals_its_closed_form(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    confidence = (levels * torch.rand(300, generator=generator)).floor()
    error = torch.rand(300, generator=generator) < 0.3
    accuracy = 1 - error.double().mean()
    # The AUROC of telling right rows (positive) from wrong ones by confidence.
    separation = auroc(confidence, ~error)
    expected = (1 - separation) * accuracy * (1 - accuracy) + 0.5 * (1 - accuracy) ** 2
    assert augrc(confidence, error).item() == pytest.approx(expected.item(), abs=1e-12)


def test_best_worst_and_no_order():
    error = torch.tensor([0] * 80 + [1] * 20)
    rank = torch.arange(100.0)
    assert augrc(-rank, error).item() == pytest.approx(0.5 * 0.2**2)
    assert augrc(rank, error).item() == pytest.approx(0.5 * 0.2**2 + 0.8 * 0.2)
    best = sum(max(0, i - 80) / i for i in range(1, 101)) / 100
    assert aurc(-rank, error).item() == pytest.approx(best)
    assert aurc(torch.zeros(100), error).item() == pytest.approx(0.2)
    assert augrc(torch.zeros(100), error).item() == pytest.approx(0.1)


def test_all_right_all_wrong_one_row_no_row():
    confidence = torch.tensor([0.3, 0.3, 0.9])
    assert aurc(confidence, torch.zeros(3)) == 0
    assert aurc(confidence, torch.ones(3)) == 1
    assert augrc(confidence, torch.ones(3)) == 0.5
    assert aurc(confidence[:1], torch.ones(1)) == 1
    empty = torch.zeros(0)
    assert aurc(empty, empty).isnan()
    assert augrc(empty, empty).isnan()


def test_order_and_dtype_are_irrelevant():
    generator = torch.Generator().manual_seed(0)
    confidence = (10 * torch.rand(200, generator=generator)).floor()
    error = torch.rand(200, generator=generator) < 0.5
    order = torch.randperm(200, generator=generator)
    for metric in (aurc, augrc):
        value = metric(confidence, error)
        assert value.dtype == torch.float64
        assert metric(confidence[order], error[order]).item() == pytest.approx(value.item(), abs=1e-14)
        assert torch.equal(metric(confidence.bfloat16(), error.int()), value)


def test_generalized_risk_ends_at_the_error_rate():
    coverage, risk = generalized_risk_curve(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0, 1, 0]))
    assert coverage.tolist() == [0, 1 / 3, 2 / 3, 1]
    np.testing.assert_allclose(risk, [0, 0, 1 / 6, 1 / 3])


@pytest.mark.parametrize(
    ("confidence", "error", "message"),
    [
        (torch.tensor([1, 2]), torch.zeros(2), r"`confidence` must be a floating-point tensor \[N\]"),
        (torch.zeros(2), torch.zeros(3), r"must have one shape \[N\], but their shapes are \[2\] and \[3\]"),
        (torch.zeros(2, 2), torch.zeros(2, 2), r"must have one shape \[N\]"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), "`confidence` must hold numbers, but it holds NaN"),
    ],
)
def test_bad_values(confidence, error, message):
    with pytest.raises(InputError, match=message):
        aurc(confidence, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
def test_certainty_is_what_the_largest_probability_lacks(dtype, scale):
    logits = (scale * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    with mpmath.workdps(3000):
        for row, found in zip(logits.double().tolist(), certainty(logits).tolist(), strict=True):
            weights = sorted(mpmath.exp(x) for x in row)
            assert found == pytest.approx(float(-mpmath.log(sum(weights[:-1]) / sum(weights))), rel=1e-12)


def test_certainty_ties_rows_that_differ_in_the_order_of_their_classes():
    logits = torch.tensor([0.1, 0.7, 30.3, 5.5, -3.1])
    orders = torch.stack([logits[list(order)] for order in itertools.permutations(range(5))])
    assert certainty(orders).unique().numel() == 1
    assert certainty(torch.tensor([[1.0, -math.inf], [math.nan, 0.0]])).tolist()[0] == math.inf
    assert certainty(orders.reshape(12, 10, 5).movedim(2, 1)).shape == (12, 10)
