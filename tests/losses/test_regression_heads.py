"""Losses of the regression heads, by their definitions, with their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.losses import (
    beta_nll_loss,
    faithful_gaussian_loss,
    gaussian_crps_loss,
    gaussian_nll_loss,
    mixture_nll_loss,
    pinball_loss,
    point_loss,
    split_log_gaussian,
    split_mixture,
    split_quantiles,
    split_student_t,
    student_t_nll_loss,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


MEAN, VARIANCE, TARGET = randn(5, 2), randn(5, 2, seed=1).exp(), randn(5, 2, seed=2)


def gradients(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*inputs).sum(), inputs)


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (lambda m, v: gaussian_crps_loss(m, v, TARGET), (MEAN, VARIANCE)),
        (lambda q: pinball_loss(q, TARGET), (randn(5, 2, 3),)),
        (lambda m, s, d: student_t_nll_loss(m, s, d, TARGET), (MEAN, VARIANCE, 2.5 + VARIANCE)),
        (lambda w, m, v: mixture_nll_loss(w, m, v, TARGET), (randn(5, 2, 3), randn(5, 2, 3), randn(5, 2, 3).exp())),
        (lambda m: point_loss(m, TARGET, "huber"), (MEAN,)),
        (lambda o: split_log_gaussian(o)[1].log(), (randn(3, 4),)),
    ],
)
def test_gradients_are_numerical(loss, inputs):
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


def test_beta_weighs_the_likelihood_by_the_variance():
    for beta in (0.0, 0.5, 1.0):
        mean_gradient, _ = gradients(lambda m, v, b=beta: beta_nll_loss(m, v, TARGET, b, "sum"), MEAN, VARIANCE)
        torch.testing.assert_close(mean_gradient, (MEAN - TARGET) / VARIANCE ** (1 - beta))
    torch.testing.assert_close(beta_nll_loss(MEAN, VARIANCE, TARGET, 0.0), gaussian_nll_loss(MEAN, VARIANCE, TARGET))
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match=r"`beta` must lie in \[0, 1\]"):
            beta_nll_loss(MEAN, VARIANCE, TARGET, beta)


def test_a_faithful_mean_has_the_gradient_of_a_squared_error():
    mean_gradient, variance_gradient = gradients(
        lambda m, v: faithful_gaussian_loss(m, v, TARGET, "sum"), MEAN, VARIANCE
    )
    torch.testing.assert_close(mean_gradient, MEAN - TARGET)
    _, expected = gradients(lambda m, v: gaussian_nll_loss(m, v, TARGET, "sum"), MEAN, VARIANCE)
    torch.testing.assert_close(variance_gradient, expected)


def test_crps_of_a_gaussian_is_gneitings():
    std = VARIANCE.sqrt()
    z = ((TARGET - MEAN) / std).numpy()
    expected = std.numpy() * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    torch.testing.assert_close(gaussian_crps_loss(MEAN, VARIANCE, TARGET, "none"), torch.from_numpy(expected))


def test_point_losses_are_torchs():
    for kind, function in (("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)):
        torch.testing.assert_close(point_loss(MEAN, TARGET, kind), function(MEAN, TARGET))
    with pytest.raises(InputError, match="`kind` must be one of"):
        point_loss(MEAN, TARGET, "mape")
    with pytest.raises(InputError, match=r"`target` must have shape \[5, 2\].*would broadcast"):
        point_loss(MEAN, TARGET[:, :1])


def test_a_student_t_s_density_is_scipys():
    location, scale, df = split_student_t(randn(5, 6))
    assert (df > 2).all()
    expected = -stats.t.logpdf(TARGET.numpy(), df.numpy(), location.numpy(), scale.numpy())
    torch.testing.assert_close(student_t_nll_loss(location, scale, df, TARGET, "none"), torch.from_numpy(expected))


def test_a_mixture_s_density_is_torchs():
    logits, mean, variance = split_mixture(randn(5, 18), 3)
    components = torch.distributions.Normal(mean, variance.sqrt())
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)
    torch.testing.assert_close(mixture_nll_loss(logits, mean, variance, TARGET, "none"), -expected.log_prob(TARGET))


def test_blocks_lie_side_by_side_on_the_last_axis():
    output = torch.arange(12.0).reshape(1, 12)
    assert split_quantiles(output, 3).tolist() == [[[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]]
    logits, mean, _ = split_mixture(output, 2)
    assert logits.tolist() == [[[0, 2], [1, 3]]]
    assert mean.tolist() == [[[4, 6], [5, 7]]]
    location, _, _ = split_student_t(output)
    assert location.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "split",
    [lambda o: split_quantiles(o, 3), lambda o: split_mixture(o, 3), split_student_t, split_log_gaussian],
)
@pytest.mark.parametrize("shape", [(2, 0), (2, 7), ()])
def test_blocks_of_another_size(split, shape):
    with pytest.raises(InputError, match=r"`output` must have shape \[\.\.\., "):
        split(torch.zeros(shape))


def test_extreme_outputs_stay_finite():
    output = torch.tensor([[1e4, -1e4, 1e4, -1e4, 1e4, -1e4]]).requires_grad_()
    target = torch.tensor([[1e3, -1e3]])
    losses = (
        gaussian_nll_loss(*split_log_gaussian(output[:, :4]), target),
        student_t_nll_loss(*split_student_t(output), target),
        mixture_nll_loss(*split_mixture(output, 1), target),
        gaussian_crps_loss(*split_log_gaussian(output[:, :4]), target),
    )
    for loss in losses:
        assert loss.isfinite()
        assert torch.autograd.grad(loss, output)[0].isfinite().all()


def test_half_precision_is_upcast():
    low, target = randn(5, 6).bfloat16(), TARGET.bfloat16()
    for loss in (
        lambda o, t: student_t_nll_loss(*split_student_t(o), t),
        lambda o, t: mixture_nll_loss(*split_mixture(o, 1), t),
        lambda o, t: pinball_loss(split_quantiles(o, 3), t),
        lambda o, t: point_loss(o[:, :2], t),
    ):
        assert loss(low, target).dtype == torch.float32
        torch.testing.assert_close(loss(low, target), loss(low.float(), target.float()))
