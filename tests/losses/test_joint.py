"""The joint log-loss as a training loss."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.functional.joint import joint_log_loss
from lightning_uq.losses import JointLoss, gaussian_nll_loss, joint_nll_loss, split_gaussian

SAMPLINGS = ("consecutive", "dyadic", "sampled")
torch.manual_seed(0)
LOGITS = 2 * torch.randn(5, 12, 3, dtype=torch.float64)
Y = torch.randint(3, (12,))


def by_definition(logits, target, blocks):
    probs = logits.softmax(-1)
    losses = []
    for block in blocks:
        joint = sum(math.prod(float(member[b, target[b]]) for b in block) for member in probs) / len(probs)
        losses.append(-math.log(joint))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tau", [1, 2, 3, 5, 12])
def test_consecutive_blocks_by_definition(tau):
    blocks = [range(i, i + tau) for i in range(0, 12 - tau + 1, tau)]
    assert joint_nll_loss(LOGITS, Y, tau).item() == pytest.approx(by_definition(LOGITS, Y, blocks), rel=1e-12)


def test_dyadic_is_the_expectation_over_all_draws_from_each_pair():
    tau = 4
    draws = [[2 * g + i for i in draw] for g in range(6) for draw in itertools.product((0, 1), repeat=tau)]
    value = joint_nll_loss(LOGITS, Y, tau, sampling="dyadic")
    assert value.item() == pytest.approx(by_definition(LOGITS, Y, draws), rel=1e-12)


def test_sampled_anchors_follow_the_generator_and_average_to_the_expectation():
    values = [
        joint_nll_loss(LOGITS, Y, 6, sampling="sampled", generator=torch.Generator().manual_seed(3)) for _ in "12"
    ]
    assert values[0] == values[1]
    drawn = torch.stack([joint_nll_loss(LOGITS, Y, 6, sampling="sampled") for _ in range(600)])
    exact = joint_nll_loss(LOGITS, Y, 6, sampling="dyadic")
    assert (drawn.mean() - exact).abs() < 4.5 * drawn.std() / math.sqrt(len(drawn))
    assert drawn.std() > 0
    three = joint_nll_loss(LOGITS, Y, 6, kappa=3, sampling="sampled")
    assert three.isfinite()


@pytest.mark.parametrize("sampling", ["consecutive", "dyadic"])
def test_it_is_the_metric_where_blocks_are_full(sampling):
    torch.testing.assert_close(
        joint_nll_loss(LOGITS, Y, 4, sampling=sampling), joint_log_loss(LOGITS, Y, 4, sampling=sampling)
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_gradients(sampling, likelihood):
    output = LOGITS if likelihood == "categorical" else LOGITS[..., :2]
    target = Y if likelihood == "categorical" else torch.randn(12, 1, dtype=torch.float64)

    def loss(x):
        return joint_nll_loss(
            x, target, 4, sampling=sampling, likelihood=likelihood, generator=torch.Generator().manual_seed(1)
        )

    assert torch.autograd.gradcheck(loss, output.clone().requires_grad_())


def test_the_gradient_weighs_each_hypothesis_by_its_joint_likelihood():
    logits = LOGITS.clone().requires_grad_()
    joint_nll_loss(logits, Y, 12).backward()
    alone = LOGITS.clone().requires_grad_()
    log_probs = alone.log_softmax(-1)[:, torch.arange(12), Y].sum(1)
    (-log_probs).sum().backward()
    posterior = log_probs.detach().softmax(0)
    torch.testing.assert_close(logits.grad, posterior[:, None, None] * alone.grad)


def test_tau_of_one_is_the_log_loss_of_the_mixture():
    mixture = LOGITS.softmax(-1).mean(0)[torch.arange(12), Y].log()
    torch.testing.assert_close(joint_nll_loss(LOGITS, Y, 1), -mixture.mean())


def test_equal_hypotheses_pay_the_sum_of_their_own_losses():
    same = LOGITS[:1].expand(7, -1, -1)
    alone = nn.functional.cross_entropy(LOGITS[0], Y)
    torch.testing.assert_close(joint_nll_loss(same, Y, 6), 6 * alone)


def test_log_space_survives_what_probabilities_would_not():
    logits = 1e4 * torch.randn(4, 1000, 10)
    y = torch.randint(10, (1000,))
    value = joint_nll_loss(logits.requires_grad_(), y, 1000)
    assert value.isfinite()
    assert value > 1e5
    value.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 11])
def test_a_batch_of_any_size_has_a_loss(sampling, rows):
    value = joint_nll_loss(LOGITS[:, :rows], Y[:rows], 5, sampling=sampling)
    assert value.isfinite()
    if sampling == "consecutive" and rows < 5:
        torch.testing.assert_close(value, joint_nll_loss(LOGITS[:, :rows], Y[:rows], rows))
    if sampling == "consecutive" and rows == 11:
        torch.testing.assert_close(value, joint_nll_loss(LOGITS[:, :10], Y[:10], 5))
    if rows == 1 and sampling != "consecutive":
        torch.testing.assert_close(value, joint_nll_loss(LOGITS[:, [0] * 5], Y[[0] * 5], 5))


def test_gaussian_by_definition():
    output, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    mean, variance = split_gaussian(output)
    log_probs = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).sum(2)
    expected = -(log_probs.reshape(3, 2, 3).sum(2).logsumexp(0) - math.log(3)).mean()
    torch.testing.assert_close(joint_nll_loss(output, y, 3, likelihood="gaussian"), expected)
    each = y.expand(3, 6, 2)  # as noise on the targets makes them
    torch.testing.assert_close(joint_nll_loss(output, each, 3, likelihood="gaussian"), expected)
    one = -gaussian_nll_loss(mean, variance, y, reduction="none", full=True).sum()
    assert one.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    narrow = LOGITS.to(dtype)
    value = joint_nll_loss(narrow, Y, 4)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), joint_nll_loss(narrow.double(), Y, 4), rtol=1e-6, atol=1e-6)


def test_nan_stays_nan_and_inputs_stay_as_they_are():
    logits = LOGITS.clone()
    logits[0, 0, 0] = torch.nan
    before = logits.clone()
    assert joint_nll_loss(logits, Y, 4).isnan()
    assert torch.equal(logits.nan_to_num(9), before.nan_to_num(9))
    assert not joint_nll_loss(LOGITS, Y, 4).requires_grad  # frozen outputs


@settings(max_examples=15)
@given(order=st.permutations(range(5)), shift=st.floats(-50, 50), sampling=st.sampled_from(["consecutive", "dyadic"]))
def test_the_order_of_hypotheses_and_a_shift_of_logits_do_not_matter(order, shift, sampling):
    loss = JointLoss(tau=4, sampling=sampling)
    torch.testing.assert_close(loss(LOGITS[list(order)] + shift, Y), loss(LOGITS, Y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: joint_nll_loss(LOGITS[0], Y), r"`logits` must be a floating-point tensor \[Z, B, C\]"),
        (lambda: joint_nll_loss(LOGITS[:0], Y), r"`logits` must be \[Z, B, C\] with Z > 0"),
        (lambda: joint_nll_loss(LOGITS, Y + 1), r"`target` must hold class indices in \[0, 3\), but it holds 3"),
        (lambda: joint_nll_loss(LOGITS, Y[:5]), r"`target` must have shape \[12\]"),
        (lambda: joint_nll_loss(LOGITS, Y.float()), r"`target` must hold class indices of an integer dtype"),
        (lambda: joint_nll_loss(LOGITS[:, :0], Y[:0]), r"at least one sample, but the batch is empty"),
        (lambda: joint_nll_loss(LOGITS, Y, likelihood="gaussian"), r"`output` must have shape \[..., 2 D\]"),
        (
            lambda: joint_nll_loss(LOGITS[0, :, :2], Y, likelihood="gaussian"),
            r"`output` must be \[Z, B, 2 D\] with Z > 0",
        ),
        (lambda: JointLoss(tau=0), r"`tau` must be an integer of at least 1, but it is 0"),
        (lambda: JointLoss(kappa=3, sampling="dyadic"), r"`kappa` must be 2 with sampling='dyadic'"),
        (lambda: JointLoss(sampling="triadic"), r"`sampling` must be one of .* but it is 'triadic'"),
        (lambda: JointLoss(likelihood="poisson"), r"`likelihood` must be one of 'categorical', 'gaussian', but it is"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
