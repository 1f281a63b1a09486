import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.functional.hashing import chain, chain_last, mix, to_normal, to_uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50)
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


def test_normal_numbers_follow_from_their_seed_alone():
    seeds = torch.tensor([3, 2**31 - 1, 3])
    normal = to_normal(seeds, 7)
    assert (normal.shape, normal.dtype) == ((3, 7), torch.float32)
    assert torch.equal(normal[0], normal[2])
    assert not (normal[0] == normal[1]).any()
    assert torch.equal(to_normal(seeds[1:2], 8)[:, :4], to_normal(seeds[1:2], 7)[:, :4])
    assert to_normal(seeds, 0).shape == (3, 0)
    # These follow checkpoints too: the hypotheses of a Bayes-by-backprop network are a function of them.
    assert mix(torch.tensor(0)).item() % 2**64 == chain(0)
    torch.testing.assert_close(
        to_normal(torch.tensor([5]), 4)[0], torch.tensor([-0.18855, -2.11919, 0.07196, 0.01129]), atol=1e-5, rtol=0
    )


def test_normal_numbers_are_independent_and_normal():
    normal = to_normal(torch.arange(100), 10_000).double()
    ordered = normal.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert (expected - steps).abs().max() < 1.95 / len(ordered) ** 0.5  # Kolmogorov and Smirnov's test at 0.1 %
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().max() < 5 / 10_000**0.5  # over seeds
    assert torch.corrcoef(normal[:, :100].T).fill_diagonal_(0).abs().max() < 0.5  # over positions
    halves = normal.reshape(100, 2, -1)
    for power in (1, 2):  # the two numbers of one hash
        pair = torch.corrcoef(halves.transpose(0, 1).reshape(2, -1).pow(power))[0, 1]
        assert abs(pair) < 5 / 500_000**0.5
