from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    diagonal_gaussian_kl,
    linear_hypermodel_kl,
    sampled_kl,
    scale_mixture_log_prob,
)

with np.load(Path(__file__).parents[1] / "reference" / "enn_losses_vi.npz") as file:
    DATA = {name.removeprefix("vi/"): torch.from_numpy(file[name]) for name in file.files if name.startswith("vi/")}
MEAN, STD, LATENT = DATA["b_mu"], F.softplus(DATA["w_rho"]), DATA["latent"]


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ ENN's numbers: 50 samples; sigma_0 = 0.8; 1 and 0.5 at 0.6


def test_they_are_the_originals():
    check(diagonal_gaussian_kl(MEAN, STD, 0.8) / 50, DATA["diag_kl"])
    check(linear_hypermodel_kl(DATA["lin_w"], MEAN, 0.8) / 50, DATA["lin_kl"])
    check(sampled_kl(LATENT, MEAN, STD, 1.0, 0.5, 0.6) / 50, DATA["sample_kl"])
    check(scale_mixture_log_prob(LATENT, 0.8), DATA["normal_log_prob"])
    check(scale_mixture_log_prob(LATENT, 1.0, 0.5, 0.6), DATA["mixture"])


# ------------------------------------------------------------------ definitions

numbers = st.floats(-3, 3, allow_nan=False)
stds = st.floats(0.05, 3)


@settings(max_examples=25)
@given(st.lists(st.tuples(numbers, stds), min_size=1, max_size=5), stds)
def test_the_diagonal_divergence_is_torchs(pairs, prior):
    mean, std = torch.tensor(pairs, dtype=torch.float64).T
    prior_scale = torch.tensor(prior, dtype=torch.float64)  # a number would become float32
    expected = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(prior_scale), prior_scale)).sum()
    torch.testing.assert_close(diagonal_gaussian_kl(mean, std, prior), expected)
    assert expected >= -1e-12


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=5), stds, stds, st.floats(0.01, 0.99))
def test_the_mixture_is_torchs(values, first, second, weight):
    weights = torch.tensor(values, dtype=torch.float64)
    scales = torch.tensor([first, second], dtype=torch.float64)
    mixture = MixtureSameFamily(
        Categorical(torch.tensor([weight, 1 - weight], dtype=torch.float64)), Normal(torch.zeros(2).double(), scales)
    )
    torch.testing.assert_close(scale_mixture_log_prob(weights, first, second, weight), mixture.log_prob(weights).sum())


def test_a_mixture_of_one_is_a_gaussian():
    for arguments in ((0.7, 0.2, 1.0), (0.2, 0.7, 0.0), (0.7, 0.7, 0.3)):
        check(scale_mixture_log_prob(LATENT, *arguments), Normal(0.0, 0.7).log_prob(LATENT).sum())


def test_the_sampled_divergence_estimates_the_exact_one():
    noise = torch.randn(200_000, 10, generator=torch.Generator().manual_seed(0))
    estimates = sampled_kl(MEAN + noise * STD, MEAN, STD, 0.8)
    assert estimates.shape == (200_000,)
    error = estimates.std() / 200_000**0.5
    assert abs(estimates.mean() - diagonal_gaussian_kl(MEAN, STD, 0.8)) < 4 * error


def test_the_linear_divergence_is_that_within_its_directions():
    weight, bias = DATA["lin_w"].double(), MEAN.double()
    basis = torch.linalg.qr(weight.T).Q  # of the directions in which the weights vary
    mean, cov = basis.T @ bias, 0.64 * basis.T @ weight.T @ weight @ basis
    q = torch.distributions.MultivariateNormal(mean, cov)
    p = torch.distributions.MultivariateNormal(torch.zeros(3).double(), 0.64 * torch.eye(3).double())
    torch.testing.assert_close(linear_hypermodel_kl(weight, bias, 0.8), kl_divergence(q, p), rtol=1e-4, atol=0)


def test_rows_that_are_alike_stay_finite():
    value = linear_hypermodel_kl(torch.ones(4, 1000), torch.zeros(1000))
    expected = 0.5 * (4 * (1000 + 1e-6) - 4 - (3 * np.log(1e-6) + np.log(4000 + 1e-6)))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_gradients():
    arguments = [x.double().requires_grad_() for x in (MEAN[:4], STD[:4])]
    assert torch.autograd.gradcheck(lambda m, s: diagonal_gaussian_kl(m, s, 0.8), arguments)
    draws = LATENT[:4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, m, s: sampled_kl(w, m, s, 0.8, 0.3, 0.4), [draws, *arguments])
    rows = DATA["lin_w"][:, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, b: linear_hypermodel_kl(w, b, 0.8), [rows, arguments[0]])


# ------------------------------------------------------------------ edges


def test_a_std_that_underflowed_costs_much_and_not_infinitely_much():
    std = F.softplus(torch.tensor([-200.0]))
    assert std == 0
    assert 80 < diagonal_gaussian_kl(torch.zeros(1), std) < 100
    assert torch.isfinite(sampled_kl(torch.zeros(1), torch.zeros(1), std, 1.0))


def test_half_precision_is_upcast_and_far_values_do_not_overflow():
    for dtype in (torch.bfloat16, torch.float16):
        value = diagonal_gaussian_kl(torch.full((1000,), 300.0, dtype=dtype), torch.ones(1000, dtype=dtype))
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(1000 * 45_000, rel=1e-4)
        assert linear_hypermodel_kl(torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype)).dtype == torch.float32
    assert torch.isfinite(scale_mixture_log_prob(torch.tensor([1e4]), 1.0, 1e-3, 0.5))


def test_no_weights_diverge_not_at_all():
    nothing = torch.zeros(0)
    assert diagonal_gaussian_kl(nothing, nothing) == 0
    assert sampled_kl(torch.zeros(3, 0), nothing, nothing, 1.0).tolist() == [0, 0, 0]


def test_bad_arguments():
    one = torch.ones(3)
    with pytest.raises(InputError, match=r"`std` must have shape \[3\], but its shape is \[2\]"):
        diagonal_gaussian_kl(one, one[:2])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="`prior_std` must be positive and finite"):
            diagonal_gaussian_kl(one, one, bad)
    with pytest.raises(InputError, match="`second_prior_std`"):
        scale_mixture_log_prob(one, 1.0, 0.0)
    with pytest.raises(InputError, match=r"`mixture_weight` must lie in \[0, 1\], but it is 1.5"):
        scale_mixture_log_prob(one, 1.0, 1.0, 1.5)
    with pytest.raises(InputError, match=r"`weights` must be \[\.\.\., 3\]"):
        sampled_kl(torch.ones(3, 4), one, one, 1.0)
    with pytest.raises(InputError, match=r"\[D, P\] and \[P\], but their shapes are \[3\] and \[3\]"):
        linear_hypermodel_kl(one, one)
