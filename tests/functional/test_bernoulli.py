"""Independent Bernoulli predictions: definitions recomputed in float64, and the same numbers as a softmax over [0, l]."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import bernoulli as scipy_bernoulli

from lightning_uq.functional import bernoulli, entropy

LOGITS = 3 * torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def two_classes(logits):
    return torch.stack([torch.zeros_like(logits), logits], 2)  # [Z, B, 2, L]


def test_definitions_with_scipy():
    p = expit(LOGITS.numpy())
    np.testing.assert_allclose(bernoulli.pooled_logits(LOGITS), logit(p.mean(0)), rtol=1e-10)
    np.testing.assert_allclose(bernoulli.bernoulli_entropy(LOGITS), scipy_bernoulli(p).entropy(), rtol=1e-9)
    information = scipy_bernoulli(p.mean(0)).entropy() - scipy_bernoulli(p).entropy().mean(0)
    np.testing.assert_allclose(bernoulli.bernoulli_mutual_information(LOGITS), information, atol=1e-12)
    energy = -np.log1p(np.exp(LOGITS.numpy())).sum(-1).mean(0)
    np.testing.assert_allclose(bernoulli.joint_energy(LOGITS), energy, rtol=1e-10)


def test_they_are_those_of_a_softmax_over_two_classes():
    pairs = two_classes(LOGITS)
    torch.testing.assert_close(bernoulli.bernoulli_expected_entropy(LOGITS), entropy.expected_entropy(pairs))
    torch.testing.assert_close(bernoulli.bernoulli_mutual_information(LOGITS), entropy.mutual_information(pairs))
    pooled = entropy.mean_log_probs(pairs)
    torch.testing.assert_close(bernoulli.pooled_logits(LOGITS), pooled[:, 1] - pooled[:, 0])
    torch.testing.assert_close(
        bernoulli.bernoulli_entropy(bernoulli.pooled_logits(LOGITS)), entropy.predictive_entropy(pairs)
    )


def test_sure_labels_keep_their_digits_in_float32():
    logits = torch.tensor([[30.0], [40.0]])
    exact = torch.logsumexp(-torch.nn.functional.softplus(logits.double()), 0) - math.log(2)
    torch.testing.assert_close(bernoulli.pooled_logits(logits), -exact.float(), rtol=1e-6, atol=0)
    p = torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    torch.testing.assert_close(bernoulli.bernoulli_entropy(torch.tensor(40.0)), (41 * p).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", [bernoulli.pooled_logits, bernoulli.bernoulli_expected_entropy])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e30, -1e30])
def test_infinite_logits_are_certain_labels(function, value):
    found = function(torch.full((2, 1, 1), value))
    assert not found.isnan().any()
    if function is not bernoulli.pooled_logits:
        assert found.item() == 0


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0.01, 30))
def test_properties(seed, members, scale):
    logits = scale * torch.randn(members, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    information = bernoulli.bernoulli_mutual_information(logits)
    assert (information >= 0).all()
    assert (information <= math.log(2) + 1e-12).all()
    shuffled = logits[torch.randperm(members)]
    torch.testing.assert_close(bernoulli.pooled_logits(shuffled), bernoulli.pooled_logits(logits))
    torch.testing.assert_close(bernoulli.pooled_logits(logits.repeat(2, 1, 1)), bernoulli.pooled_logits(logits))
    torch.testing.assert_close(bernoulli.pooled_logits(-logits), -bernoulli.pooled_logits(logits))
    torch.testing.assert_close(bernoulli.bernoulli_mutual_information(-logits), information)
    if members == 1:
        torch.testing.assert_close(bernoulli.pooled_logits(logits), logits[0])
        assert (information < 1e-12).all()


def test_gradients():
    logits = LOGITS[:2, :2].clone().requires_grad_()
    for function in (bernoulli.pooled_logits, bernoulli.bernoulli_expected_entropy, bernoulli.joint_energy):
        assert torch.autograd.gradcheck(function, logits)


def test_half_precision_is_upcast():
    assert bernoulli.pooled_logits(LOGITS.bfloat16()).dtype == torch.float32
    assert bernoulli.joint_energy(LOGITS.half()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_hypotheses_that_nearly_agree_keep_their_digits(dtype, spread):
    generator = torch.Generator().manual_seed(0)
    center = torch.linspace(-8, 8, 30, dtype=torch.float64)
    logits = (center + spread * torch.randn(20, 30, generator=generator, dtype=torch.float64)).to(dtype)
    on, off = logits.double().sigmoid(), (-logits.double()).sigmoid()
    expected = sum(torch.special.entr(p.mean(0)) - torch.special.entr(p).mean(0) for p in (on, off))
    torch.testing.assert_close(bernoulli.bernoulli_mutual_information(logits).double(), expected, rtol=1e-6, atol=1e-14)
