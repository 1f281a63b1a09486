import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.functional._hashing import chain, chain_last, to_uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(seed=INT64, last=st.lists(INT64, min_size=1, max_size=4))
def test_the_last_step_of_a_chain_on_tensors_is_that_on_integers(seed, last):
    tensor = chain_last(chain(seed), torch.tensor(last))
    assert [value % 2**64 for value in tensor.tolist()] == [chain(seed, value) for value in last]


def test_numbers_that_are_kept_by_checkpoints_do_not_change():
    """Members' initial weights and bootstraps follow from these: another value would be another ensemble."""
    assert chain(1, 0) >> 32 == 1799830773
    assert chain(0, 0) >> 32 == 2251342522


def test_uniform_numbers_never_reach_their_bounds():
    extremes = to_uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert extremes.min() == 2.0**-54
    assert extremes.max() < 1
