"""Scores of labels against their definitions in exact arithmetic, and sets: coverage, invariances, edges."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    aps_scores,
    conformal_quantile,
    group_quantiles,
    lac_scores,
    prediction_sets,
    raps_scores,
    true_label_scores,
)
from tests.counting import peak_bytes

SCORES = {
    "lac": lambda logits, u, target=None: lac_scores(logits, target),
    "aps": lambda logits, u, target=None: aps_scores(logits, None, target),
    "aps_randomized": aps_scores,
    "raps": lambda logits, u, target=None: raps_scores(logits, 0.02, 2, None, target),
    "raps_randomized": lambda logits, u, target=None: raps_scores(logits, 0.02, 2, u, target),
}


def data(num, num_classes=6, seed=0, scale=2.0):
    """Logits, labels drawn from other probabilities, and uniforms."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num, num_classes, generator=generator, dtype=torch.float64)
    noisy = logits / 2 + torch.arange(num_classes) / 4
    return (
        logits,
        torch.multinomial(noisy.softmax(1), 1, generator=generator)[:, 0],
        torch.rand(num, generator=generator),
    )


rows = st.lists(st.integers(-40, 40), min_size=1, max_size=6)


@settings(max_examples=60)
@given(rows)
def test_lac_is_the_log_odds_against_a_label(row):
    with mpmath.workdps(100):
        weights = [mpmath.exp(x) for x in row]
        for i, found in enumerate(lac_scores(torch.tensor([row], dtype=torch.float32))[0].tolist()):
            others = mpmath.fsum(weights[:i] + weights[i + 1 :])
            expected = float(mpmath.log(others / weights[i])) if others else -math.inf
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=60)
@given(rows, st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 3), st.sampled_from([None, 0.0, 0.25, 1.0]))
def test_aps_and_raps_are_their_definitions(row, penalty, k_reg, uniform):
    u = None if uniform is None else torch.tensor([uniform])
    logits = torch.tensor([row], dtype=torch.float32)
    found = raps_scores(logits, penalty, k_reg, u)[0].tolist()
    with mpmath.workdps(100):
        total = mpmath.fsum(mpmath.exp(x) for x in row)
        probs = [mpmath.exp(x) / total for x in row]
        for i, p in enumerate(probs):
            rank = sum(x >= row[i] for x in row)
            score = mpmath.fsum(q for q, x in zip(probs, row, strict=True) if x > row[i])
            score += (1 if uniform is None else uniform) * p + penalty * max(rank - k_reg, 0)
            assert found[i] == pytest.approx(float(score - 1), rel=1e-12, abs=1e-14 if penalty or uniform else 1e-90)
    if penalty == 0:
        assert found == aps_scores(logits, u)[0].tolist()


def test_lac_does_not_sort():
    logits, _, _ = data(100, num_classes=50)
    with profile() as profiled:
        lac_scores(logits)
    assert "aten::sort" not in {event.name for event in profiled.events()}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 3, 17, 100, 1000])
def test_scores_of_true_labels_are_those_among_all_labels(score, dtype, num_classes):
    # To the last bit, or a row that equals a fitted one could be left out of its own threshold. Half precision and rounded rows have ties.
    logits, target, u = data(300, num_classes)
    logits[:100] = logits[:100].round()
    target[::2] = logits.argmax(1)[::2]
    expected = true_label_scores(score(logits.to(dtype), u), target)
    assert torch.equal(score(logits.to(dtype), u, target), expected)
    alone = torch.cat([score(logits[i : i + 1].to(dtype), u[i : i + 1], target[i : i + 1]) for i in range(20)])
    assert torch.equal(alone, expected[:20])


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_memory_does_not_grow_with_the_rows(score):
    logits, target, u = data(20_000, 100)
    at_once = peak_bytes(lambda: score(logits[:1000], u[:1000]))
    assert peak_bytes(lambda: score(logits, u, target)) < 2 * at_once + 20_000 * 8 * 3
    assert peak_bytes(lambda: score(logits, u)) < 2 * at_once + logits.numel() * 8 * 2  # the scores, and their parts


def test_gradients_of_lac_scores():
    logits, target, _ = data(5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lac_scores, (logits,))
    assert torch.autograd.gradcheck(lac_scores, (logits, target))


def test_sure_rows_stay_apart():
    logits = torch.tensor([[50.0, 0.0], [60.0, 0.0], [900.0, 0.0]])
    for scores in (lac_scores(logits), aps_scores(logits)):
        assert len(set(true_label_scores(scores, torch.zeros(3, dtype=torch.long)).tolist())) == 3
    wrong = true_label_scores(lac_scores(logits), torch.ones(3, dtype=torch.long))
    assert wrong.tolist() == [50.0, 60.0, 900.0]


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_scores_follow_the_order_of_classes_and_shifts_and_ties(score):
    logits, _, u = data(30)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = score(logits, u)
    torch.testing.assert_close(score(logits[:, order], u), expected[:, order])
    torch.testing.assert_close(score(logits + 7, u), expected)
    tied = torch.tensor([[1.0, 1.0, 0.3], [0.7, 2.0, 2.0], [0.1, 0.1, 0.1]])
    found = score(tied, u[:3])
    assert found[0, 0] == found[0, 1]
    assert found[1, 1] == found[1, 2]
    assert len(set(found[2].tolist())) == 1
    # A more probable label never has a higher score.
    assert (expected.gather(1, logits.argsort(1, descending=True)).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_sets_are_all_labels_below_the_quantile(score):
    logits, target, u = data(200)
    scores = score(logits, u)
    threshold = conformal_quantile(true_label_scores(scores, target), 0.2)
    sets = prediction_sets(scores, threshold)
    assert sets.tolist() == [[value <= threshold.item() for value in row] for row in scores.tolist()]
    assert sets.gather(1, target[:, None]).sum() >= 0.8 * 201


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_coverage_over_resplits(score):
    logits, target, u = data(2000)
    own = true_label_scores(score(logits, u), target)
    generator = torch.Generator().manual_seed(1)
    splits = torch.stack([own[torch.randperm(2000, generator=generator)] for _ in range(1000)], 1)
    covered = splits[999:] <= conformal_quantile(splits[:999], 0.1)
    assert covered.double().mean().item() == pytest.approx(0.9, abs=0.003)


def test_sets_that_are_never_empty_cover_more():
    logits, target, _ = data(4000, scale=6.0)
    target = torch.where(torch.rand(4000, generator=torch.Generator().manual_seed(3)) < 0.97, logits.argmax(1), target)
    scores = lac_scores(logits)
    threshold = conformal_quantile(true_label_scores(scores[:2000], target[:2000]), 0.1)
    allowed = prediction_sets(scores[2000:], threshold)
    filled = prediction_sets(scores[2000:], threshold, allow_empty=False)
    covered = [sets.gather(1, target[2000:, None]).float().mean().item() for sets in (allowed, filled)]
    assert covered[0] == pytest.approx(0.9, abs=0.02)
    assert covered[1] > 0.95
    empty = ~allowed.any(1)
    assert empty.any()
    assert torch.equal(filled[~empty], allowed[~empty])
    assert torch.equal(filled[empty], torch.nn.functional.one_hot(logits[2000:].argmax(1)[empty], 6).bool())


def test_thresholds_by_class_cover_each_class():
    logits, target, _ = data(8000)
    scores = lac_scores(logits)
    half = slice(0, 4000), slice(4000, 8000)
    thresholds = group_quantiles(true_label_scores(scores[half[0]], target[half[0]]), target[half[0]], 6, 0.1)
    covered = prediction_sets(scores[half[1]], thresholds).gather(1, target[half[1], None])[:, 0].float()
    for label in range(6):
        assert covered[target[half[1]] == label].mean().item() == pytest.approx(0.9, abs=0.04)


def test_a_threshold_per_row_and_infinite_thresholds():
    scores = torch.tensor([[0.1, 0.9], [0.1, 0.9]])
    assert prediction_sets(scores, torch.tensor([[0.5], [1.0]])).tolist() == [[True, False], [True, True]]
    assert prediction_sets(scores, torch.tensor([0.0, 1.0])).tolist() == [[False, True], [False, True]]
    assert prediction_sets(scores, math.inf).all()
    assert not prediction_sets(scores, -math.inf).any()
    assert prediction_sets(scores, -math.inf, allow_empty=False).tolist() == [[True, False], [True, False]]
    assert prediction_sets(torch.tensor([[math.nan, 2.0]]), 0.5).tolist() == [[True, False]]
    assert prediction_sets(torch.zeros(1, 2), -1.0, allow_empty=False).all()  # labels that are tied


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_edges(score):
    u = torch.full((2,), 0.5)
    assert score(torch.zeros(0, 3), u[:0]).shape == (0, 3)
    assert score(torch.zeros(2, 1), u).shape == (2, 1)
    masked = score(torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, -math.inf]]), u)
    assert not masked.isnan().any()
    assert torch.equal(masked[:, 2], masked.amax(1))
    assert score(torch.zeros(2, 3).bfloat16(), u).dtype == torch.float64
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="`logits` must hold no NaN"):
            score(torch.tensor([[0.0, bad], [0.0, 0.0]]), u)
    with pytest.raises(InputError, match="`logits` must hold no NaN"):
        score(torch.full((2, 2), -math.inf), u)
    with pytest.raises(InputError, match=r"`logits` must have shape \[B, C\] with C > 0"):
        score(torch.zeros(2, 0), u)
    with pytest.raises(InputError, match=r"`logits` must have shape \[B, C\]"):
        score(torch.zeros(2, 3, 4), u)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: raps_scores(torch.zeros(2, 3), -0.1), "`penalty` must be at least 0"),
        (lambda: raps_scores(torch.zeros(2, 3), 0.1, -1), "`k_reg` must be an integer of at least 0"),
        (lambda: aps_scores(torch.zeros(2, 3), torch.zeros(3)), r"`uniforms` must have shape \[2\]"),
        (lambda: aps_scores(torch.zeros(2, 3), torch.full((2,), 1.5)), r"`uniforms` must lie in \[0, 1\]"),
        (lambda: aps_scores(torch.zeros(2, 3), torch.full((2,), math.nan)), r"`uniforms` must lie in \[0, 1\]"),
        (lambda: lac_scores(torch.zeros(2, 3), torch.tensor([0, 3])), r"class indices in \[0, 3\)"),
        (lambda: aps_scores(torch.zeros(2, 3), None, torch.tensor([0])), r"`target` must have shape \[2\]"),
        (lambda: true_label_scores(torch.zeros(2, 3), torch.tensor([0, 3])), r"class indices in \[0, 3\)"),
        (lambda: true_label_scores(torch.zeros(2, 3), torch.tensor([0])), r"`target` must have shape \[2\]"),
        (lambda: prediction_sets(torch.zeros(2, 3), torch.zeros(2)), r"`threshold` must have shape \[\] or \[3\] or \[2, 1\]"),
        (lambda: prediction_sets(torch.zeros(2, 3), math.nan), "`threshold` must hold numbers, but it holds NaN"),
        (lambda: prediction_sets(torch.zeros(2, 3), 0.5, allow_empty=None), "`allow_empty` must be True or False"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
