import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from lightning_uq.errors import InputError
from lightning_uq.functional import joint_log_loss
from lightning_uq.functional.testbed import (
    categorical_kl,
    gaussian_kl,
    gaussian_log_likelihood,
    gaussian_sample_kl,
    joint_log_likelihood,
    kl_estimate,
    log_sum_product,
    true_label_log_probs,
    uniform_kl,
)

INF = math.inf


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "reference" / "enn_testbed_kl.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file.files}


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the original's numbers


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_divergence(reference, tau):
    logits = reference[f"tau{tau}/enn_logits"].movedim(1, 0)  # seed first there
    target = reference[f"tau{tau}/y_test"][..., 0]
    true = reference[f"tau{tau}/true_ll"]
    model = joint_log_likelihood(true_label_log_probs(logits, target))
    close(true - model, reference[f"tau{tau}/kl_per_seed"])
    estimate = kl_estimate(true, model)
    close(estimate.mean, reference[f"tau{tau}/kl_estimate"])
    close(estimate.std, reference[f"tau{tau}/kl_std"])
    assert (estimate.num_infinite, estimate.num_draws) == (0, 12)


def test_the_originals_infinite_draw(reference):
    draws = reference["parse_kl/in"]
    estimate = kl_estimate(draws, torch.zeros(4))
    close(estimate.mean, reference["parse_kl/out"])
    assert estimate.num_infinite == 1


def test_the_originals_smaller_functions(reference):
    close(log_sum_product(reference["lsp/nu"], reference["lsp/q"]), reference["lsp/out"])
    close(categorical_kl(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.6, 0.3])), reference["discrete_kl"])
    error, covariance = reference["reg/err"][:, 0], reference["reg/cov"]
    close(gaussian_log_likelihood(error, covariance), reference["reg/gaussian_ll"][0])
    close(gaussian_log_likelihood(error, error.square().mean() * torch.eye(4)), reference["reg/optimized_ll"][0])
    close(gaussian_kl(*map(torch.tensor, (0.3, 0.5, -0.1, 0.9))), reference["reg/kl_gaussian"])


# ------------------------------------------------------------------ joint likelihood


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), members=st.integers(1, 7), tau=st.integers(1, 6), scale=st.floats(0.1, 30))
def test_joint_likelihood_is_its_definition(seed, members, tau, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, 4, tau, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (4, tau), generator=generator)
    log_probs = true_label_log_probs(logits, target)
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
    right = joint_log_likelihood(true_label_log_probs(logits, torch.zeros(1, 10, dtype=torch.long)))
    assert right.item() == pytest.approx(math.log(0.5))
    mixed = joint_log_likelihood(true_label_log_probs(logits, torch.arange(10).remainder(2).unsqueeze(0)))
    assert mixed.item() == pytest.approx(-5e5)  # each member is wrong five times


def test_no_probability_at_all_is_infinite_not_nan():
    logits = torch.tensor([0.0, -INF]).expand(3, 2, 4, 2)
    log_probs = true_label_log_probs(logits, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]))
    assert joint_log_likelihood(log_probs.split(1)).tolist() == [pytest.approx(0), -INF]


def test_half_precision_is_read_in_float64():
    log_probs = true_label_log_probs(
        torch.zeros(2, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    )
    assert log_probs.dtype == torch.float64
    assert joint_log_likelihood(log_probs).item() == pytest.approx(-math.log(2))


def test_no_index_is_an_error():
    with pytest.raises(InputError, match="`log_probs` to hold at least one index z, but got none"):
        joint_log_likelihood(iter([]))
    with pytest.raises(InputError, match=r"`log_probs` to be a floating-point tensor \[Z, S, tau\]"):
        joint_log_likelihood(torch.zeros(3, 4))
    with pytest.raises(InputError, match="`target` to be of shape"):
        true_label_log_probs(torch.zeros(1, 3, 2), torch.zeros(4, dtype=torch.long))


# ------------------------------------------------------------------ the estimate


def test_infinite_draws_are_counted_and_clipped():
    estimate = kl_estimate(torch.zeros(4), torch.tensor([-1.0, -INF, -3.0, -INF]))
    assert (estimate.mean.item(), estimate.num_infinite) == (2.5, 2)
    assert not estimate.std.isfinite()


def test_all_infinite_is_infinite_and_nan_is_nan():
    assert kl_estimate(torch.zeros(2), torch.tensor([-INF, -INF])).mean == INF
    assert kl_estimate(torch.zeros(2), torch.tensor([math.nan, -1.0])).mean.isnan()
    assert kl_estimate(torch.tensor([math.nan, 0.0]), torch.tensor([-INF, -1.0])).mean.isnan()


def test_shapes_that_do_not_fit_are_errors():
    for shape in (3, 0):
        with pytest.raises(InputError, match="one number for each of the"):
            kl_estimate(torch.zeros(2 if shape else 0), torch.zeros(shape))
    with pytest.raises(InputError, match=r"`true_log_likelihood` to be a floating-point tensor \[S\]"):
        kl_estimate(torch.zeros(2, dtype=torch.long), torch.zeros(2))


@settings(max_examples=10, deadline=None)
@given(classes=st.integers(2, 9), tau=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_uniform_is_the_estimate_of_equal_probabilities(classes, tau, seed):
    true = -torch.rand(5, generator=torch.Generator().manual_seed(seed))
    target = torch.randint(classes, (5, tau))
    model = joint_log_likelihood(true_label_log_probs(torch.zeros(3, 5, tau, classes), target))
    torch.testing.assert_close(uniform_kl(true, classes, tau), kl_estimate(true, model).mean)


def test_the_environment_itself_has_no_divergence():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 1, 3, generator=generator).softmax(-1)
    target = torch.multinomial(probs[:, 0], 1, generator=generator)
    true = true_label_log_probs(probs.log().unsqueeze(0), target)
    assert kl_estimate(true[0, :, 0], joint_log_likelihood(true)).mean.abs() < 1e-9


# ------------------------------------------------------------------ categories and Gaussians


def test_a_term_without_weight_or_probability_adds_nothing():
    assert log_sum_product(torch.tensor([1.0, 0.0]), torch.tensor([[0.5], [0.0]])).item() == pytest.approx(
        math.log(0.5)
    )
    assert categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert categorical_kl(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])) == INF


def test_gaussian_density_is_torchs():
    root = torch.randn(5, 5, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(5)
    error = torch.randn(3, 5, dtype=torch.float64)
    expected = MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(error)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance), expected)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance.expand(3, 5, 5)), expected)


def test_gaussian_kl_is_torchs():
    mean, std, other_mean, other_std = torch.rand(4, 6, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(other_mean, other_std))
    torch.testing.assert_close(gaussian_kl(mean, std, other_mean, other_std), expected)


def test_regression_divergence_is_its_definition():
    samples, target = torch.randn(7, 5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    true = torch.randn(5, dtype=torch.float64)
    density = Normal(samples, 0.4).log_prob(target).sum(2).exp().mean(0)
    torch.testing.assert_close(gaussian_sample_kl(samples, target, 0.4, true).mean, (true - density.log()).mean())
    with pytest.raises(InputError, match="`noise_std` to be above 0, but got 0"):
        gaussian_sample_kl(samples, target, 0.0, true)
    with pytest.raises(InputError, match=r"`target` to be of shape \[5, 3\], but got \[3\]"):
        gaussian_sample_kl(samples, target[0], 0.4, true)
