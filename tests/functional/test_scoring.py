"""Proper scores against their definitions."""

import math

import pytest
import torch

from lightning_uq.functional import brier_score, negative_log_likelihood


def test_definitions():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(20, 5, generator=generator).softmax(1)
    target = torch.randint(5, (20,), generator=generator)
    for row in range(20):
        p, y = probs[row].tolist(), int(target[row])
        squared = sum((p[c] - (c == y)) ** 2 for c in range(5))
        assert brier_score(probs, target)[row].item() == pytest.approx(squared, rel=1e-6)
        assert negative_log_likelihood(probs, target)[row].item() == pytest.approx(-math.log(p[y]), rel=1e-6)


def test_extremes():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([0, 1])
    assert brier_score(probs, target).tolist() == [0.0, 2.0]
    assert negative_log_likelihood(probs, target).tolist() == [0.0, math.inf]


def test_brier_keeps_the_digits_of_a_confident_row():
    probs = torch.tensor([[1 - 1e-4, 1e-4]], dtype=torch.float64)
    value = brier_score(probs.float(), torch.tensor([0])).double()
    assert value.item() == pytest.approx(2e-8, rel=1e-2)


def test_dtypes_and_gradients():
    probs = torch.tensor([[0.25, 0.75]])
    target = torch.tensor([1])
    for score in (brier_score, negative_log_likelihood):
        assert score(probs.bfloat16(), target).dtype == torch.float32
        assert score(probs.double(), target).dtype == torch.float64
        wide = probs.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s=score: s(x, target), wide)


def test_the_true_distribution_scores_best():
    """Proper: the expected score over y ~ p is least at p itself."""
    truth = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(100, 3, generator=generator, dtype=torch.float64).softmax(1)
    for score in (brier_score, negative_log_likelihood):

        def expected(probs, score=score):
            return sum(truth[0, y] * score(probs, torch.full((len(probs),), y)) for y in range(3))

        assert (expected(others) > expected(truth)).all()
