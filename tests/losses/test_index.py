"""Losses over indices, held to the numbers of google-deepmind/enn and to their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.losses import (
    CombinedLoss,
    JointLoss,
    L2WeightDecay,
    accuracy_error,
    average_over_indices,
    categorical_log_likelihood,
    cross_entropy_loss,
    elbo_loss,
    gaussian_noise_log_likelihood,
    l2_loss,
    l2_weight_decay,
)
from lightning_uq.losses.data_noise import BootstrapNoise
from lightning_uq.losses.index import takes_indices, weighted_mean
from lightning_uq.networks.ensemble import EnsembleNetwork

DATA = {
    k: torch.from_numpy(v)
    for k, v in np.load(Path(__file__).parents[1] / "reference/enn_losses_single_index.npz").items()
}
REG, CLS, Y_REG, Y = DATA["reg_out"], DATA["cls_out"], DATA["y_reg"], DATA["y_cls"].flatten()
WEIGHTS = DATA["weights"].flatten()


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Table(nn.Module):
    """A network whose outputs are those of the file, by member; draws are the file's too."""

    def __init__(self, outputs, indices):
        super().__init__()
        self.outputs, self.indices = outputs, indices

    def sample_index(self, num_samples, generator=None):
        assert num_samples == len(self.indices)
        return self.indices

    def forward(self, x, index):
        return self.outputs[index]


# ---------------------------------------------------------------------- the original's numbers


def test_l2_cross_entropy_and_accuracy_of_each_index():
    check(l2_loss(REG, Y_REG), DATA["L2/none"])
    check(l2_loss(REG, Y_REG, WEIGHTS), DATA["L2/weights"])
    check(cross_entropy_loss(CLS, Y), DATA["xent/none"])
    check(cross_entropy_loss(CLS, Y, WEIGHTS), DATA["xent/weights"])
    check(accuracy_error(CLS, Y), DATA["acc_error"])


@pytest.mark.parametrize("kind", ["bernoulli", "exponential", "poisson", "uniform"])
@pytest.mark.parametrize("seed", [0, 3])
def test_weights_of_each_index(kind, seed):
    prefix = f"boot/{kind}/seed{seed}/"
    weights = DATA[prefix + "weights"].squeeze(2)
    check(cross_entropy_loss(CLS, Y, weights), DATA[prefix + "xent"])
    check(l2_loss(REG, Y_REG, weights), DATA[prefix + "L2"])
    ours = BootstrapNoise(kind, seed).weights(DATA["data_index"].flatten(), torch.arange(5))
    assert ours.shape == weights.shape  # other draws; their distributions are compared elsewhere


def test_targets_of_each_index():
    check(l2_loss(REG, Y_REG + DATA["gauss/ensemble/noise"]), DATA["gauss/ensemble/L2"])


def test_averages_over_drawn_indices():
    draws = DATA["avg/indices"].long()
    for outputs, target, loss, name in ((CLS, Y, cross_entropy_loss, "xent"), (REG, Y_REG, l2_loss, "L2")):
        average = average_over_indices(
            lambda output, y, loss=loss: loss(output, y, WEIGHTS), Table(outputs, draws), None, target, 10
        )
        check(average, DATA[f"avg/{name}"])


def test_weight_decay():
    parameters = {
        name.removeprefix("wd/"): value.clone().requires_grad_()
        for name, value in DATA.items()
        if name.startswith("wd/") and value.ndim
    }
    assert len(parameters) == 4
    everything = l2_weight_decay(parameters, 0.37, lambda name, p: True)
    check(everything, DATA["wd/all_decay"])
    check(everything + DATA["avg/xent"], DATA["wd/all_loss"])
    check(l2_weight_decay(parameters, 0.37), DATA["wd/noprior_decay"])
    check(l2_weight_decay(parameters, lambda p: 2 * p, lambda name, p: True), DATA["wd/callable_decay"])


def test_combination():
    """The original's averages over the same ten draws, and their sum."""
    drawn = DATA["avg/indices"].long()
    loss = CombinedLoss(
        [lambda o, y: cross_entropy_loss(o, y, WEIGHTS).mean(), lambda o, y: accuracy_error(o, y).mean()], [0.3, 2.0]
    )
    check(loss(CLS[drawn], Y), DATA["combine/loss"])


def test_evidence_lower_bound():
    check(categorical_log_likelihood(CLS, Y), DATA["elbo/categorical_ll"])
    check(gaussian_noise_log_likelihood(REG, Y_REG, 0.7), DATA["elbo/awgn_ll_sigma0.7"])
    kl = torch.tensor(0.9)
    check(elbo_loss(DATA["elbo/categorical_ll"], kl, 1), DATA["elbo/loss"])
    scaled = elbo_loss(DATA["elbo/categorical_ll"], kl, 1, temperature=0.25, input_dim=3)
    check(scaled, DATA["elbo/loss_temp"])


# ---------------------------------------------------------------------- definitions and edges


@settings(max_examples=20)
@given(repeats=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_weight_of_n_is_a_sample_that_stands_there_n_times(repeats):
    torch.manual_seed(1)
    output, y = torch.randn(3, 4, 2), torch.randn(4, 2)
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(repeats))
    expected = (output[:, rows] - y[rows]).square().mean(2).sum(1) / 4
    torch.testing.assert_close(l2_loss(output, y, torch.tensor(repeats)), expected)


def test_maps_are_averaged_and_weighted_by_sample():
    logits, y = torch.randn(2, 3, 4, 5, 6), torch.randint(4, (3, 5, 6))
    each = torch.stack([nn.functional.cross_entropy(member, y, reduction="none").mean((1, 2)) for member in logits])
    torch.testing.assert_close(cross_entropy_loss(logits, y), each.mean(1))
    weights = torch.rand(2, 3)
    torch.testing.assert_close(cross_entropy_loss(logits, y, weights), (each * weights).mean(1))
    torch.testing.assert_close(accuracy_error(logits, y)[0], (logits[0].argmax(1) != y).float().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_upcast_and_double_stays(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for loss, output, target in ((cross_entropy_loss, CLS, Y), (l2_loss, REG, Y_REG)):
        narrow = output.to(dtype)
        value = loss(narrow, target)
        assert value.dtype == wide
        torch.testing.assert_close(
            value, loss(narrow.to(wide), target.to(wide) if target.is_floating_point() else target)
        )
    assert accuracy_error(CLS.to(dtype), Y).dtype == wide


def test_empty_batches_and_nan_are_nan_for_their_index_alone():
    assert cross_entropy_loss(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.long)).isnan().all()
    assert l2_loss(torch.zeros(2, 0, 1), torch.zeros(0, 1)).isnan().all()
    output = torch.zeros(2, 3, 2)
    output[1, 0, 0] = torch.nan
    for value in (cross_entropy_loss(output, torch.tensor([0, 1, 0])), l2_loss(output, torch.zeros(3, 2))):
        assert value.isnan().tolist() == [False, True]


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[1e30, -1e30]]])
    assert cross_entropy_loss(logits, torch.tensor([0])).item() == 0
    assert cross_entropy_loss(logits, torch.tensor([1])).isfinite().all()


def test_inputs_are_left_alone_and_gradients_flow():
    output, y = REG.clone().requires_grad_(), Y_REG.clone()
    l2_loss(output, y, WEIGHTS).sum().backward()
    assert torch.equal(output.detach(), REG)
    assert torch.equal(y, Y_REG)
    torch.testing.assert_close(output.grad, 2 * (REG - Y_REG) * WEIGHTS[:, None] / 8)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, torch.tensor([0, 3, 1]), weights), logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: l2_loss(torch.zeros(2, 3, 1), torch.zeros(3)),
            r"`target` must have shape \[3, 1\] or \[2, 3, 1\], but its shape is \[3\]",
        ),
        (
            lambda: l2_loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)),
            r"`output` must be a floating-point tensor",
        ),
        (lambda: cross_entropy_loss(torch.zeros(2, 3, 4), torch.zeros(3)), r"`target` must hold class indices"),
        (lambda: cross_entropy_loss(torch.zeros(2, 3, 4), torch.zeros(2).long()), r"`target` must have shape \[3\]"),
        (
            lambda: accuracy_error(torch.zeros(3, 4), torch.zeros(3).long()),
            r"`logits` must be a floating-point tensor \[Z, B, C",
        ),
        (
            lambda: weighted_mean(torch.zeros(2, 3), torch.zeros(3, 1)),
            r"`weights` must have shape \[3\] or \[2, 3\].*\[3, 1\]",
        ),
        (lambda: l2_weight_decay({}, -1.0), r"`scale` must be a number of at least 0, or a function, but it is -1.0"),
        (
            lambda: average_over_indices(l2_loss, nn.Identity(), None, Y, 0),
            r"`num_samples` must be an integer of at least 1, but it is 0",
        ),
        (
            lambda: CombinedLoss([]),
            r"`losses` and `weights` must have the same length of at least 1, but they have 0 and 0",
        ),
        (lambda: CombinedLoss([l2_loss], [1.0, 2.0]), r"`losses` and `weights`.*but they have 1 and 2"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_module_decays_without_its_priors_and_frozen_parts():
    network = nn.ModuleDict({"learned": nn.Linear(2, 2), "prior": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    network["frozen"].requires_grad_(False)
    expected = sum(p.square().sum() for p in network["learned"].parameters())
    torch.testing.assert_close(L2WeightDecay(0.5)(network, None), 0.5 * expected)
    L2WeightDecay(0.5)(network, None).backward()
    torch.testing.assert_close(network["learned"].weight.grad, network["learned"].weight.detach())
    assert network["prior"].weight.grad is None
    assert l2_weight_decay(network["frozen"]).item() == 0
    assert l2_weight_decay({}).item() == 0
    half = nn.Linear(2, 2).bfloat16()
    assert l2_weight_decay(half).dtype == torch.float32


def test_average_enumerates_no_ensemble_but_draws():
    network = EnsembleNetwork([nn.Linear(2, 3) for _ in range(3)])
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    generator = torch.Generator().manual_seed(5)
    value = average_over_indices(cross_entropy_loss, network, x, y, 20, generator=generator)
    draws = network.sample_index(20, torch.Generator().manual_seed(5))
    torch.testing.assert_close(value, cross_entropy_loss(network(x), y)[draws].mean())
    value.backward()
    assert all(p.grad is not None for p in network.parameters())


class Counting(nn.Module):
    """A loss with a state of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        self.calls += 1
        return self.factor * output.square().mean()


def test_a_sum_keeps_the_state_of_its_losses_and_of_the_network():
    counting = Counting()
    loss = CombinedLoss([counting, nn.CrossEntropyLoss()], [2.0, 1.0])
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    for step in range(3):
        loss(network(torch.randn(8, 2) + 5), torch.randint(3, (8,))).backward()
        assert network[0].num_batches_tracked == step + 1
    state = loss.state_dict()
    assert [int(v) for k, v in state.items() if k.endswith("calls")] == [3]
    assert counting.factor.grad is not None
    assert len(list(loss.parameters())) == 1
    other = CombinedLoss([Counting(), nn.CrossEntropyLoss()], [2.0, 1.0])
    other.load_state_dict(state)
    assert other.losses[0].calls == 3


def test_a_sum_with_a_joint_loss_is_one_over_indices():
    logits, y = torch.randn(3, 6, 2), torch.randint(2, (6,))
    joint, single = JointLoss(tau=3), nn.CrossEntropyLoss()
    loss = CombinedLoss([joint, single], [1.0, 0.5])
    assert takes_indices(loss)
    assert not takes_indices(CombinedLoss([single]))
    torch.testing.assert_close(loss(logits, y), joint(logits, y) + 0.5 * cross_entropy_loss(logits, y).mean())
