"""Noise by sample and index, held to google-deepmind/enn: its numbers where its draws are stored, else its distributions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import bootstrap_weights, counter_uniform
from lightning_uq.functional.data_noise import (
    gaussian_bootstrap_weights,
    gaussian_signatures,
    gaussian_target_noise,
    member_target_noise,
)

DATA, MEMBERS = (
    {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / f"reference/{name}.npz").items()}
    for name in ("enn_data_noise", "enn_losses_single_index")
)
CASES = [
    ("gaussian", "bernoulli"),
    ("gaussian", "exponential"),
    ("scaled", "bernoulli"),
    ("scaled", "exponential"),
    ("unit", "bernoulli"),
]
N, D = 400, 6


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def indices(distribution, num, dim=D):
    z = torch.randn(num, dim, dtype=torch.float64)
    if distribution == "scaled":
        return z / math.sqrt(dim)
    return torch.cat([z.new_ones(num, 1), z[:, 1:] / math.sqrt(dim - 1)], 1) if distribution == "unit" else z


# ---------------------------------------------------------------------- the original's numbers


@pytest.mark.parametrize(("distribution", "kind"), CASES)
def test_weights_of_the_stored_signatures(distribution, kind):
    z = DATA["z_unit" if distribution == "unit" else "z"]
    weights = gaussian_bootstrap_weights(z, DATA["b_raw"], DATA["c_raw"], kind=kind, distribution=distribution)
    check(weights, DATA[f"{distribution}/{kind}"].squeeze(2))


@pytest.mark.parametrize("distribution", ["gaussian", "scaled", "unit"])
def test_target_noise_of_the_stored_signatures(distribution):
    z, b = (DATA["z_unit"], DATA["b_raw_dm1"]) if distribution == "unit" else (DATA["z"], DATA["b_raw"])
    noise = gaussian_target_noise(z, b, 0.5, distribution=distribution)
    check(noise, DATA[f"{distribution}/target_noise"].squeeze(2))


def test_signatures_are_as_large_as_theirs():
    ours = gaussian_signatures(DATA["data_index"].flatten(), D)
    assert ours.shape == DATA["b_raw"].shape
    assert stats.ks_2samp(gaussian_signatures(torch.arange(200), D).flatten(), DATA["b_raw"].flatten()).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["bernoulli", "exponential", "poisson", "uniform"])
def test_weights_of_members_are_distributed_as_theirs(kind):
    theirs = torch.cat([MEMBERS[f"boot/{kind}/seed{seed}/weights"].flatten() for seed in (0, 3)]).double()
    ours = bootstrap_weights(torch.arange(2000), 5, 0, kind, dtype=torch.float64).flatten()
    if kind in ("bernoulli", "poisson"):
        assert set(theirs.tolist()) <= set(ours.tolist())
        values = sorted(set(ours.tolist()))[:3]
        counts = [[float((x == v).sum()) for v in values] for x in (ours, theirs)]
        observed = [row[: 2 if kind == "bernoulli" else 3] for row in counts]
        assert stats.chi2_contingency(observed).pvalue > 1e-3
    else:
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_target_noise_of_members_is_distributed_as_theirs():
    theirs = MEMBERS["gauss/ensemble/noise"].flatten()
    ours = member_target_noise(torch.arange(2000), 5, 0.5).flatten()
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    assert stats.kstest(ours / 0.5, "norm").pvalue > 1e-3


# ---------------------------------------------------------------------- distributions


@pytest.mark.parametrize(("distribution", "kind"), CASES)
def test_mean_weight_is_one_and_its_law_is_the_name_s(distribution, kind):
    b, c = (gaussian_signatures(torch.arange(N), D, seed=5, stream=stream) for stream in (0, 1))
    z = indices(distribution, N)
    weights = gaussian_bootstrap_weights(z, b, c, kind=kind, distribution=distribution)
    assert weights.mean().item() == pytest.approx(1, abs=0.1)
    if kind == "bernoulli":
        assert set(weights.unique().tolist()) == {0.0, 2.0}
        per_sample = weights.mean(0)
        if distribution != "unit":  # whose unit favours some samples over others
            assert (per_sample - 1).abs().max() < 5 / math.sqrt(N)
    else:
        # One weight for each pair of a sample and an index of its own. Given z the sum of two squares is exponential, of mean
        # |z|^2 / D (or |z|^2), which is 1 on average.
        length = z.square().sum(1) / (D if distribution == "gaussian" else 1)
        own = weights.diagonal() / length
        assert stats.kstest(own, "expon").pvalue > 1e-3


@pytest.mark.parametrize("distribution", ["gaussian", "scaled", "unit"])
def test_target_noise_has_the_deviation_asked_for(distribution):
    b = gaussian_signatures(torch.arange(N), D - (distribution == "unit"), seed=2)
    noise = gaussian_target_noise(indices(distribution, N), b, 0.3, distribution=distribution)
    assert noise.std().item() == pytest.approx(0.3, rel=0.1)
    assert noise.mean().abs() < 0.05
    if distribution == "gaussian":  # each sample's own, since its signature has length 1
        assert (noise.std(0) / 0.3 - 1).abs().max() < 0.2


def test_target_noise_varies_smoothly_with_the_index():
    b, z = gaussian_signatures(torch.arange(20), D), indices("gaussian", 1)
    near = gaussian_target_noise(z + 1e-3, b, 1.0) - gaussian_target_noise(z, b, 1.0)
    assert near.abs().max() < 1e-2
    middle = gaussian_target_noise(0.5 * z, b, 1.0)
    torch.testing.assert_close(middle, 0.5 * gaussian_target_noise(z, b, 1.0))  # linear, as a learnable function of z


def test_streams_seeds_dimensions_and_samples_are_independent():
    columns = [gaussian_signatures(torch.arange(20_000), 3, s, stream=t) for s in (0, 1) for t in (0, 1)]
    columns += [member_target_noise(torch.arange(20_000), 2, 1.0, num_targets=2).permute(1, 0, 2).reshape(20_000, 4)]
    columns += [bootstrap_weights(torch.arange(20_000), 3, 0, "exponential", dtype=torch.float64).T]
    together = torch.cat(columns, 1).T
    off = torch.corrcoef(together) - torch.eye(len(together), dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(20_000)
    assert torch.corrcoef(torch.stack([together[0, :-1], together[0, 1:]]))[0, 1].abs() < 5 / math.sqrt(20_000)
    assert stats.kstest(together[0], "norm").pvalue > 1e-3


# ---------------------------------------------------------------------- it belongs to (sample, index)


@settings(max_examples=15)
@given(order=st.permutations(range(12)), size=st.integers(1, 12))
def test_neither_order_nor_batch_matters(order, size):
    order = torch.tensor(order)
    whole = gaussian_signatures(torch.arange(12), 4, seed=1)
    pieces = torch.cat([gaussian_signatures(piece, 4, seed=1) for piece in order.split(size)])
    assert torch.equal(pieces, whole[order])
    noise = member_target_noise(torch.arange(12), 3, 0.1, num_targets=2)
    pieces = torch.cat([member_target_noise(piece, 3, 0.1, num_targets=2) for piece in order.split(size)], 1)
    assert torch.equal(pieces, noise[:, order])


def test_drawn_members_and_seeds_have_the_weights_of_their_numbers():
    index, drawn = torch.arange(6), torch.tensor([2, 0, 2, 1])
    assert torch.equal(bootstrap_weights(index, drawn, 3, "poisson"), bootstrap_weights(index, 3, 3, "poisson")[drawn])
    large = torch.tensor([2**31 - 1, 2**60, -5])
    assert counter_uniform(index, large, 0).unique().numel() == 18
    assert torch.equal(member_target_noise(index, drawn, 0.1), member_target_noise(index, 3, 0.1)[drawn])


def test_several_targets_have_noise_of_their_own():
    b = torch.stack([gaussian_signatures(torch.arange(5), D, stream=k) for k in (2, 3)], 1)
    z = indices("gaussian", 7)
    noise = gaussian_target_noise(z, b, 0.2)
    assert noise.shape == (7, 5, 2)
    torch.testing.assert_close(noise[..., 1], gaussian_target_noise(z, b[:, 1], 0.2))


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_follow_the_index(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, b = indices("gaussian", 3).to(dtype), gaussian_signatures(torch.arange(4), D)
    assert gaussian_bootstrap_weights(z, b).dtype == wide
    assert gaussian_target_noise(z, b, 0.1).dtype == wide
    torch.testing.assert_close(gaussian_target_noise(z, b, 0.1), gaussian_target_noise(z.to(wide), b, 0.1))


def test_empty_batches_no_noise_and_nan():
    empty = torch.zeros(0, dtype=torch.long)
    z = indices("gaussian", 3)
    assert gaussian_signatures(empty, D).shape == (0, D)
    assert gaussian_bootstrap_weights(z, gaussian_signatures(empty, D)).shape == (3, 0)
    assert gaussian_target_noise(z, gaussian_signatures(empty, D), 0.1).shape == (3, 0)
    assert member_target_noise(empty, 2, 0.1).shape == (2, 0, 1)
    b = gaussian_signatures(torch.arange(4), D)
    assert not gaussian_target_noise(z, b, 0.0).any()
    assert torch.equal(gaussian_bootstrap_weights(z, b, kind="none"), torch.ones(3, 4).double())
    before = z.clone()
    gaussian_target_noise(z, b, 0.1)
    assert torch.equal(z, before)
    z[0, 0] = torch.nan
    assert gaussian_target_noise(z, b, 0.1).isnan().any(1).tolist() == [True, False, False]


Z, B = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_signatures(torch.zeros(3), 4), r"`index` must be sample positions \[B\], integers"),
        (lambda: gaussian_signatures(torch.arange(3), 0), r"`dim` must be an integer of at least 1"),
        (
            lambda: gaussian_bootstrap_weights(Z, B, kind="poisson"),
            r"`kind` must be 'bernoulli' and 'exponential'.*'gaussian', but it is 'poisson'",
        ),
        (
            lambda: gaussian_bootstrap_weights(Z, B, B, kind="exponential", distribution="unit"),
            r"`kind` must be 'bernoulli' for .*'unit', but it is 'exponential'",
        ),
        (
            lambda: gaussian_bootstrap_weights(Z, B, kind="exponential"),
            r"kind='exponential' needs `second_signature`, but it is None",
        ),
        (
            lambda: gaussian_bootstrap_weights(Z, B[:, 1:]),
            r"`signature` must end in an axis of 4.*its shape is \[3, 3\]",
        ),
        (
            lambda: gaussian_bootstrap_weights(Z, B, B[:, 1:], kind="exponential"),
            r"`second_signature` must end in an axis of 4",
        ),
        (
            lambda: gaussian_bootstrap_weights(Z, B, distribution="dirichlet"),
            r"`distribution` must be one of 'gaussian', 'scaled', 'unit'",
        ),
        (lambda: gaussian_bootstrap_weights(torch.zeros(2).long(), B), r"`z` must be a floating-point tensor \[Z, D\]"),
        (lambda: gaussian_target_noise(Z, B, 0.1, distribution="unit"), r"`signature` must end in an axis of 3"),
        (lambda: gaussian_target_noise(Z, B, -0.1), r"`std` must be a finite number of at least 0, but it is -0.1"),
        (
            lambda: member_target_noise(torch.arange(2), 2, float("nan")),
            r"`std` must be a finite number of at least 0, but it is nan",
        ),
        (
            lambda: member_target_noise(torch.arange(2), torch.zeros(2), 0.1),
            r"`members` must be member numbers \[M\], integers",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
