import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    joint_log_likelihood,
    joint_log_loss,
    true_class_log_probs,
)

INF = math.inf


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), members=st.integers(1, 7), tau=st.integers(1, 6), scale=st.floats(0.1, 30))
def test_joint_likelihood_is_its_definition(seed, members, tau, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, 4, tau, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (4, tau), generator=generator)
    log_probs = true_class_log_probs(logits, target)
    probs = logits.softmax(-1).gather(-1, target.expand(members, -1, -1).unsqueeze(-1)).squeeze(-1)
    expected = probs.prod(2).mean(0)
    torch.testing.assert_close(joint_log_likelihood(log_probs).exp(), expected)
    # In parts of any size, in any order of members, and with each twice, it is the same.
    order = torch.randperm(members, generator=generator)
    for parts in (log_probs.split(2), [log_probs[order]], [log_probs, log_probs], [log_probs[:0], log_probs]):
        torch.testing.assert_close(joint_log_likelihood(iter(parts)), joint_log_likelihood(log_probs))
    # It is the joint log-loss of the draws, one after the other.
    loss = joint_log_loss(logits.flatten(1, 2), target.flatten(), tau, sampling="consecutive")
    torch.testing.assert_close(-joint_log_likelihood(log_probs).mean(), loss)


def test_extreme_logits_neither_underflow_nor_hide():
    logits = torch.tensor([[[[1e5, 0.0]] * 10], [[[0.0, 1e5]] * 10]])  # tau = 10, one draw, two members
    right = joint_log_likelihood(true_class_log_probs(logits, torch.zeros(1, 10, dtype=torch.long)))
    assert right.item() == pytest.approx(math.log(0.5))
    mixed = joint_log_likelihood(true_class_log_probs(logits, torch.arange(10).remainder(2).unsqueeze(0)))
    assert mixed.item() == pytest.approx(-5e5)  # each member is wrong five times


def test_no_probability_at_all_is_infinite_not_nan():
    logits = torch.tensor([0.0, -INF]).expand(3, 2, 4, 2)
    log_probs = true_class_log_probs(logits, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]))
    assert joint_log_likelihood(log_probs.split(1)).tolist() == [pytest.approx(0), -INF]


def test_half_precision_is_read_in_float64():
    log_probs = true_class_log_probs(
        torch.zeros(2, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    )
    assert log_probs.dtype == torch.float64
    assert joint_log_likelihood(log_probs).item() == pytest.approx(-math.log(2))


def test_no_index_is_an_error():
    with pytest.raises(InputError, match="`log_probs` must hold at least one index z, but it holds none"):
        joint_log_likelihood(iter([]))
    with pytest.raises(InputError, match=r"`log_probs` must be a floating-point tensor \[Z, S, tau\]"):
        joint_log_likelihood(torch.zeros(3, 4))
    with pytest.raises(InputError, match="`target` must have shape"):
        true_class_log_probs(torch.zeros(1, 3, 2), torch.zeros(4, dtype=torch.long))
