"""Conformal risk control against a search over all thresholds, and the risk over resplits."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import conformal_quantile, false_negative_threshold, prediction_sets, risk_threshold


def by_search(scores, relevant, alpha):
    """The smallest of all thresholds with (sum of losses + 1) / (n + 1) <= alpha, in exact arithmetic."""
    rows = [
        [s for s, r in zip(row, keep, strict=True) if r]
        for row, keep in zip(scores, relevant, strict=True)
        if any(keep)
    ]
    for q in sorted({-math.inf, math.inf, *[s for row in rows for s in row]}):
        total = sum(Fraction(sum(s > q for s in row), len(row)) for row in rows)
        if total + 1 <= Fraction(alpha).limit_denominator(1000) * (len(rows) + 1):
            return float(q)
    return math.inf


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
)
def test_the_threshold_is_found_by_a_search(rows, alpha):
    scores = [[s for s, _ in row] for row in rows]
    relevant = [[r for _, r in row] for row in rows]
    found = false_negative_threshold(torch.tensor(scores).float(), torch.tensor(relevant), alpha)
    assert found.item() == by_search(scores, relevant, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 1 / 3, 0.7, 1.0])
def test_one_element_per_row_gives_the_conformal_quantile(alpha):
    for num in range(40):
        scores = torch.randn(num, 4, generator=torch.Generator().manual_seed(num))
        relevant = torch.nn.functional.one_hot(torch.arange(num) % 4, 4).bool()
        assert false_negative_threshold(scores, relevant, alpha) == conformal_quantile(scores[relevant], alpha)


def labels(num, num_labels=5):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num, num_labels, generator=generator, dtype=torch.float64)
    return logits, torch.rand(num, num_labels, generator=generator) < (logits / 2).sigmoid()


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_missed_labels_over_resplits(alpha):
    logits, target = labels(1000)
    logits, target = logits[target.any(1)], target[target.any(1)]
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for _ in range(300):
        order = torch.randperm(len(logits), generator=generator)
        fit, new = order[:400], order[400:]
        sets = prediction_sets(-logits[new], false_negative_threshold(-logits[fit], target[fit], alpha))
        total += ((target[new] & ~sets).sum(1) / target[new].sum(1)).mean().item() / 300
    assert alpha - 0.01 < total <= alpha + 0.002


def test_missed_pixels_of_masks_and_maps_of_classes():
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.randn(600, 1, 1, generator=generator)
    mask = torch.rand(600, 8, 8, generator=generator) < 0.3
    logits = torch.where(mask, 2.0, -2.0) + difficulty + torch.randn(600, 8, 8, generator=generator)
    threshold = false_negative_threshold(-logits[:300], mask[:300], 0.1)
    new = mask[300:]
    missed = ((new & (-logits[300:] > threshold)).sum((1, 2)) / new.sum((1, 2))).mean().item()
    assert missed == pytest.approx(0.1, abs=0.03)
    assert torch.equal(threshold, false_negative_threshold(-logits[:300].flatten(1), mask[:300].flatten(1), 0.1))
    # Ignored pixels may hold anything.
    broken = torch.where(mask, -logits, torch.nan)
    assert false_negative_threshold(broken[:300], mask[:300], 0.1) == threshold


def test_rows_without_a_label_are_left_out():
    logits, target = labels(50)
    target[::2] = False
    kept = target.any(1)
    expected = false_negative_threshold(-logits[kept], target[kept], 0.2)
    assert false_negative_threshold(-logits, target, 0.2) == expected
    assert false_negative_threshold(-logits, torch.zeros_like(target), 0.2) == math.inf
    assert false_negative_threshold(-logits[:0], target[:0], 0.2) == math.inf


def test_a_grid_gives_the_first_threshold_that_the_search_allows():
    logits, target = labels(200)
    logits, target = logits[target.any(1)], target[target.any(1)]
    grid = torch.linspace(-6, 6, 200, dtype=torch.float64)
    missed = ((-logits[..., None] > grid) & target[..., None]).sum(1) / target.sum(1)[:, None]
    for alpha in (0.05, 0.1, 0.5):
        exact = false_negative_threshold(-logits, target, alpha)
        assert risk_threshold(missed, grid, alpha) == grid[grid >= exact][0]
        assert risk_threshold(7 * missed[:, ::4], grid[::4], 7 * alpha if alpha < 0.14 else 1.0, bound=7.0) < math.inf
    assert risk_threshold(missed, grid, 0.0) == math.inf
    assert risk_threshold(missed, grid, 1.0) == grid[0]
    assert risk_threshold(missed[:0], grid, 0.5) == math.inf


def test_the_bound_enters():
    losses = torch.tensor([[1.0, 0.0]]).expand(9, 2)
    grid = torch.tensor([0.0, 1.0])
    assert risk_threshold(losses, grid, alpha=0.1) == 1
    assert risk_threshold(losses, grid, alpha=0.1, bound=1.1) == math.inf


FLAT = torch.zeros(2, 3)
GRID = torch.arange(3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: false_negative_threshold(FLAT, FLAT, 0.1), "`relevant` must be bool, but its dtype is torch.float32. Pass"),
        (lambda: false_negative_threshold(FLAT, FLAT.bool()[:1], 0.1), r"`relevant` must have shape \[2, 3\]"),
        (lambda: false_negative_threshold(FLAT / 0, FLAT == 0, 0.1), "`scores` must hold numbers"),
        (lambda: false_negative_threshold(FLAT, FLAT == 0, 2), r"`alpha` must be a number in \[0, 1\]"),
        (lambda: risk_threshold(FLAT / 0, GRID, 0.1), "`losses` must hold numbers"),
        (lambda: risk_threshold(FLAT, GRID / 0, 0.1), "`thresholds` must ascend"),
        (lambda: risk_threshold(FLAT, -GRID, 0.1), "`thresholds` must ascend, but they do not"),
        (lambda: risk_threshold(FLAT, GRID[:2], 0.1), r"`thresholds` must have shape \[3\]"),
        (lambda: risk_threshold(FLAT + 2, GRID, 0.1), "`losses` must be at most `bound` = 1, but the largest is 2"),
        (lambda: risk_threshold(FLAT + GRID / 4, GRID, 0.1), "`losses` must not increase with the threshold"),
        (lambda: risk_threshold(FLAT, GRID, 0.1, bound=0.0), "`bound` must be positive"),
        (lambda: risk_threshold(FLAT, GRID, -1), r"`alpha` must be a number in \[0, 1\]"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
