import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import bootstrap_weights, counter_uniform, member_seed

KINDS = ("bernoulli", "exponential", "poisson")
N = 100_000


def reference_uniform(seed: int, member: int, index: int) -> float:
    """The hash once more, with Python's own integers."""
    mask = (1 << 64) - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = 0
    for value in (seed, member):
        key = mix((key + value + 1) * 0x9E3779B97F4A7C15 & mask)
    return ((mix((key + (index + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) + 0.5) / 2**53


@settings(max_examples=25)
@given(seed=st.integers(-(2**63), 2**63 - 1), member=st.integers(0, 30), index=st.integers(0, 2**62))
def test_hash_is_the_one_of_unsigned_integers(seed, member, index):
    value = counter_uniform(torch.tensor([index]), member + 1, seed)[member, 0]
    assert value.dtype == torch.float64
    assert value.item() == reference_uniform(seed, member, index)
    assert 0 < value < 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_weight_belongs_to_the_sample(kind, data):
    """Whatever batch, order or number of members it is asked in."""
    order = torch.tensor(data.draw(st.permutations(range(40))))
    size = data.draw(st.integers(1, 40))
    members = data.draw(st.integers(1, 6))
    whole = bootstrap_weights(torch.arange(40), 7, 3, kind)
    pieces = [bootstrap_weights(piece, members, 3, kind) for piece in order.split(size)]
    assert torch.equal(torch.cat(pieces, 1), whole[:members, order])


@pytest.mark.parametrize("kind", KINDS)
def test_members_and_seeds_differ_and_are_uncorrelated(kind):
    weights = torch.cat([bootstrap_weights(torch.arange(N), 3, s, kind, dtype=torch.float64) for s in (0, 1)])
    off_diagonal = torch.corrcoef(weights)[~torch.eye(6, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5 / math.sqrt(N)
    neighbours = torch.corrcoef(torch.stack([weights[0, :-1], weights[0, 1:]]))[0, 1]
    assert neighbours.abs() < 5 / math.sqrt(N)


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("bernoulli", {0: 0.5, 2: 0.5}),
        ("poisson", {k: math.exp(-1) / math.factorial(k) for k in range(6)}),
    ],
)
def test_frequencies(kind, distribution):
    weights = bootstrap_weights(torch.arange(N), 4, 11, kind)
    for value, probability in distribution.items():
        error = math.sqrt(probability * (1 - probability) / weights.numel())
        assert (weights == value).double().mean().item() == pytest.approx(probability, abs=4.5 * error)
    assert weights.unique().numel() >= len(distribution)
    assert torch.equal(weights, weights.round())


def test_exponential_follows_its_distribution_function():
    weights = bootstrap_weights(torch.arange(N), 1, 5, "exponential", dtype=torch.float64)[0].sort().values
    distance = (torch.arange(1, N + 1) / N - (-torch.expm1(-weights))).abs().max()
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov, p = 0.001
    assert weights.min() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_mean_is_one(kind):
    weights = bootstrap_weights(torch.arange(N), 4, 2, kind, dtype=torch.float64)
    assert weights.mean().item() == pytest.approx(1, abs=5 / math.sqrt(weights.numel()))


def test_none_is_one_everywhere():
    assert torch.equal(bootstrap_weights(torch.arange(3), 2, 0, "none"), torch.ones(2, 3))


def test_empty_batch_and_small_integers():
    assert bootstrap_weights(torch.zeros(0, dtype=torch.long), 3, 0, "poisson").shape == (3, 0)
    short = bootstrap_weights(torch.tensor([1, 2], dtype=torch.int32), 3, 0, "exponential")
    assert torch.equal(short, bootstrap_weights(torch.tensor([1, 2]), 3, 0, "exponential"))


@pytest.mark.parametrize("index", [torch.zeros(2), torch.zeros(2, 1, dtype=torch.long), torch.tensor([True])])
def test_index_must_be_integers(index):
    with pytest.raises(InputError, match=r"`index` must be sample positions \[B\], integers, but it is"):
        bootstrap_weights(index, 2, 0, "poisson")


def test_unknown_kind():
    with pytest.raises(InputError, match=r"`bootstrap` must be .* but it is 'jackknife'"):
        bootstrap_weights(torch.arange(2), 2, 0, "jackknife")


def test_member_seeds_fit_32_bits_and_neighbouring_ensembles_share_none():
    seeds = [member_seed(seed, member) for seed in range(-5, 50) for member in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_device_does_not_matter(kind):
    index = torch.arange(10_000)
    assert torch.equal(bootstrap_weights(index.cuda(), 3, 0, kind).cpu(), bootstrap_weights(index, 3, 0, kind))
