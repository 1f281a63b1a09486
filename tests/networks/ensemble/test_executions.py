"""All executions give the same numbers, for every index, in both modes, and raise the same errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks import (
    MLP,
    build_ensemble,
)
from tests.networks.ensemble.members import (
    ARCHITECTURES,
    AT_ONCE,
    KINDS,
    assert_same,
    build,
    gradients,
    inputs,
    run,
    state_of,
)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("execution", AT_ONCE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_executions_give_the_same_numbers(name, execution, training, each):
    make, x = ARCHITECTURES[name], inputs(name)
    loop, other = (build(make, kind).train(training).double() for kind in ("loop", execution))
    assert_same(state_of(loop), state_of(other), rtol=0, atol=0)
    for _ in range(2):  # twice, so that moved running statistics show in the output
        expected, actual = (run(copy.deepcopy(network), x.double(), each) for network in (loop, other))
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1])
        assert_same(expected[2], actual[2])
        assert_same(expected[3], actual[3])
        for network in (loop, other):
            network(x.double() * 3 + 1)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    batch=st.integers(2, 5),
    norm=st.sampled_from([None, "rms", "layer", "batch"]),
    activation=st.sampled_from(["relu", "silu", "tanh", "gelu"]),
    training=st.booleans(),
    data=st.data(),
)
def test_any_mlp_and_any_index(seed, num, sizes, batch, norm, activation, training, data):
    def make():
        return MLP(sizes[0], sizes[-1], hidden_sizes=sizes[1:-1], activation=activation, norm=norm)

    index = torch.tensor(data.draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=5)))
    networks = {kind: build(make, kind, num, seed).train(training).double() for kind in KINDS}
    x = torch.randn(batch, sizes[0], dtype=torch.float64)
    results = {}
    for kind, network in networks.items():
        output = network(x, index)
        alone = [network.member(i).eval()(x) for i in range(num)] if not training else None
        if alone is not None:
            torch.testing.assert_close(output, torch.stack([alone[i] for i in index]))
        output.square().sum().backward()
        results[kind] = output, state_of(network), gradients(network)
    for kind in AT_ONCE:
        torch.testing.assert_close(results[kind][0], results["loop"][0])
        assert_same(results["loop"][1], results[kind][1])
        assert_same(results["loop"][2], results[kind][2])


@pytest.mark.parametrize("execution", KINDS)
def test_only_the_members_in_the_index_run(execution):
    network = build(lambda: MLP(2, 1, hidden_sizes=(4,), norm="batch"), execution, 4)
    before = state_of(network)
    network(torch.randn(6, 2), torch.tensor([3, 1, 3]))
    after = state_of(network)
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"1", "3"}
    assert after["members.3.1.num_batches_tracked"] == 1  # named twice, run once


@pytest.mark.parametrize("execution", KINDS)
def test_index(execution):
    network, x = build(lambda: nn.Linear(2, 3), execution, 3), torch.randn(4, 2)
    every = network(x)
    assert every.shape == (3, 4, 3)
    assert network.num_indices == 3
    assert network.evaluation_index(100).tolist() == [0, 1, 2]
    torch.testing.assert_close(network(x, network.evaluation_index(100)), every, rtol=0, atol=0)
    torch.testing.assert_close(network(x, torch.tensor([2, 0, 1], dtype=torch.int32)), every[[2, 0, 1]])
    drawn = network.sample_index(2000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, network.sample_index(2000, torch.Generator().manual_seed(0)))
    assert (torch.bincount(drawn, minlength=3) > 600).all()
    assert network(torch.randn(0, 2)).shape == (3, 0, 3)


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize(
    ("index", "text"),
    [
        (torch.tensor([0, 3]), r"`index` must hold member numbers in \[0, 3\), but it holds 0 to 3"),
        (torch.tensor([-1]), r"in \[0, 3\), but it holds -1 to -1"),
        (
            torch.tensor([0.0]),
            r"`index` must be member numbers, an integer tensor \[Z\], but it is torch.float32 of shape \[1\]",
        ),
        (torch.tensor([[0]]), r"an integer tensor \[Z\], but it is torch.int64 of shape \[1, 1\]"),
        (torch.zeros(0, dtype=torch.long), r"but it is torch.int64 of shape \[0\]"),
        (2, r"an integer tensor \[Z\], but it is 2"),
    ],
)
def test_a_bad_index_is_reported(execution, index, text):
    with pytest.raises(InputError, match=text):
        build(lambda: nn.Linear(2, 3), execution)(torch.zeros(1, 2), index)


@pytest.mark.parametrize("execution", KINDS)
def test_other_bad_arguments_are_reported(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    with pytest.raises(
        InputError, match=r"`xs` must hold one batch per member, shape \[3, B, ...\], but it is \[2, 5, 2\]"
    ):
        network.forward_each(torch.zeros(2, 5, 2))
    with pytest.raises(InputError, match=r"A member's number must be in \[0, 3\), but it is 3"):
        network.member(3)
    with pytest.raises(InputError, match=r"A member's number must be in \[0, 3\), but it is -1"):
        network.member_state_dict(-1)
    with pytest.raises(InputError, match="`algorithm` must be 'norm' or 'value', but it is 'both'"):
        network.clip_gradients_per_member(1.0, "both")
    for members, text in [
        ([], "`members` must hold at least one"),
        ([nn.ReLU(), 3], "item 1 is 3"),
        (nn.Sequential(nn.ReLU()), "a list of modules, but it is one Sequential"),
    ]:
        with pytest.raises(InputError, match=text):
            build_ensemble(members, execution)


def test_unknown_execution_is_reported():
    with pytest.raises(InputError, match="`execution` must be 'loop', 'stacked', 'vmap' or 'auto', but it is 'fast'"):
        build_ensemble([nn.Linear(2, 2)], "fast")


def test_stacked_members_take_a_tensor():
    with pytest.raises(InputError, match="take one tensor, but argument `x` is a dict"):
        build(lambda: nn.Linear(2, 3), "stacked")({"x": torch.zeros(1, 2)})


@pytest.mark.parametrize("execution", KINDS)
def test_dropout_masks_are_each_member_s_own(execution):
    network = build(lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.25), _Eye(50)), execution, 4)
    x = torch.ones(40, 50)
    output = network(x)
    values = output.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    rates = (output == 0).flatten(1).float().mean(1)
    assert ((rates - 0.25).abs() < 0.04).all()  # 2,000 draws: four standard deviations
    kept = (output != 0).float().flatten(1)
    agreement = (kept[0] == kept[1]).float().mean()
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.05
    assert torch.equal(network.eval()(x), x.expand(4, 40, 50))
    network.train()
    torch.manual_seed(5)
    once = network(x)
    torch.manual_seed(5)
    assert torch.equal(network(x), once)


class _Eye(nn.Module):
    """Passes its input on, with a parameter to count as a member, and functional dropout of rate zero."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, x):
        return F.linear(F.dropout(x, 0.0, self.training), self.weight)


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if self.training else self.layer(x) * 0 + 7


@pytest.mark.parametrize("execution", KINDS)
def test_members_follow_the_mode(execution):
    network, x = build(_Branches, execution), torch.randn(3, 2)
    assert not network(x).eq(7).any()
    assert network.eval()(x).eq(7).all()
    assert not network.member(0).training
    for module in network.modules():  # as Lightning puts modes back after a validation
        module.training = True
    assert not network(x).eq(7).any()
    assert network.member(0).training
    made_in_eval = build(lambda: _Branches().eval(), execution)
    assert made_in_eval(x).eq(7).all() or execution == "loop"
