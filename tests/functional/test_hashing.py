import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.functional.hashing import chain, chain_last, mix, rows_to_uniform, to_normal, to_uniform

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


@pytest.mark.parametrize("num_classes", [2, 3, 1000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 8.0])
def test_numbers_of_rows_are_uniform_and_hardly_move_by_rounding(num_classes, spread):
    generator = torch.Generator().manual_seed(0)
    rows = (spread * torch.randn(2000, num_classes, generator=generator)).log_softmax(1)
    found = rows_to_uniform(rows)
    assert found.min() >= 0
    assert found.max() < 1
    distance = (found.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max()
    assert distance < 1.63 / 2000**0.5  # Kolmogorov's at the level 0.01
    rounded = rows_to_uniform(rows + 1e-7 * torch.randn(rows.shape, generator=generator))
    moved = (found - rounded).abs()
    assert torch.minimum(moved, 1 - moved).max() < 1e-3


def test_numbers_of_rows_without_a_class_and_of_half_precision():
    rows = torch.tensor([[0.0, -torch.inf, -1.0], [0.0, 0.0, -1.0], [-torch.inf, -torch.inf, -torch.inf]])
    found = rows_to_uniform(rows)
    assert bool(((found >= 0) & (found < 1)).all())
    assert torch.equal(found, rows_to_uniform(rows.bfloat16()))
    assert rows_to_uniform(rows[:0]).shape == (0,)
