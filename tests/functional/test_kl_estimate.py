import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    gaussian_sample_kl,
    joint_log_likelihood,
    kl_estimate,
    true_class_log_probs,
    uniform_kl,
)

INF = math.inf


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
    with pytest.raises(InputError, match=r"`true_log_likelihood` must be a floating-point tensor \[S\]"):
        kl_estimate(torch.zeros(2, dtype=torch.long), torch.zeros(2))


@settings(max_examples=10)
@given(classes=st.integers(2, 9), tau=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_uniform_is_the_estimate_of_equal_probabilities(classes, tau, seed):
    true = -torch.rand(5, generator=torch.Generator().manual_seed(seed))
    target = torch.randint(classes, (5, tau))
    model = joint_log_likelihood(true_class_log_probs(torch.zeros(3, 5, tau, classes), target))
    torch.testing.assert_close(uniform_kl(true, classes, tau), kl_estimate(true, model).mean)


def test_the_environment_itself_has_no_divergence():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 1, 3, generator=generator).softmax(-1)
    target = torch.multinomial(probs[:, 0], 1, generator=generator)
    true = true_class_log_probs(probs.log().unsqueeze(0), target)
    assert kl_estimate(true[0, :, 0], joint_log_likelihood(true)).mean.abs() < 1e-9


def test_regression_divergence_is_its_definition():
    samples, target = torch.randn(7, 5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    true = torch.randn(5, dtype=torch.float64)
    density = Normal(samples, 0.4).log_prob(target).sum(2).exp().mean(0)
    torch.testing.assert_close(gaussian_sample_kl(samples, target, 0.4, true).mean, (true - density.log()).mean())
    with pytest.raises(InputError, match="`noise_std` must be positive and finite, but it is 0"):
        gaussian_sample_kl(samples, target, 0.0, true)
    with pytest.raises(InputError, match=r"`target` must have shape \[5, 3\], but its shape is \[3\]"):
        gaussian_sample_kl(samples, target[0], 0.4, true)
