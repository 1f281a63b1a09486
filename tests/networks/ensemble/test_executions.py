"""The equality of the three executions, and what an ensemble owes its members: gradients, clipping, state, copies."""

import copy
import functools
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks import (
    MLP,
    EnsembleNetwork,
    NetworkWithPrior,
    StackedEnsembleNetwork,
    TabularNetwork,
    VmapEnsembleNetwork,
    build_ensemble,
)
from tests.versions import VMAP_EXPORT, skip_on_torch_2_6

KINDS = {"loop": EnsembleNetwork, "stacked": StackedEnsembleNetwork, "vmap": VmapEnsembleNetwork}
AT_ONCE = ["stacked", "vmap"]


def build(make, execution, num=3, seed=0, **kwargs):
    """The same members in every execution."""
    torch.manual_seed(seed)
    return build_ensemble([make() for _ in range(num)], execution, **kwargs)


def state_of(network, what=lambda t: t):
    """Detached copies by the members' names."""
    return {name: what(t).detach().clone() for name, t in network.state_dict(keep_vars=True).items()}


def gradients(network):
    """Gradients by the members' names; the network is spoilt."""
    for p in network.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    return {name: t for name, t in network.state_dict().items() if t.is_floating_point()}


def assert_same(a, b, **kwargs):
    assert list(a) == list(b)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, msg=lambda text, name=name: f"{name}: {text}", **kwargs)


class Functional(nn.Module):
    """Does in functions and methods, on shapes of its own, what modules usually do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12))
        self.bias = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.register_buffer("shift", torch.randn(1, 6))
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = x.reshape(x.shape[0], 3, 4)
        x = (x - x.mean(-1, keepdim=True)).view(x.size(0), -1)
        h = F.linear(x, self.weight, bias=self.bias) * self.scale + self.shift
        a, b = F.silu(h).chunk(2, dim=-1)
        h = torch.cat([a, b.tanh()], 1) + 0.5 * h
        h = F.layer_norm(h, (6,), self.bias.abs(), None) + F.rms_norm(h, (6,), weight=self.bias)
        h = torch.stack([h, h.exp().clamp(max=3.0)], dim=1).sum(1)
        out = F.normalize(self.last(h), dim=-1) ** 2
        return F.log_softmax(out[..., :3], dim=1).unsqueeze(1).transpose(1, 2).squeeze(-1).contiguous()


class Images(nn.Module):
    """Flattens, and has linear layers on more than two axes."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(15, 3), nn.Softmax(dim=-1))

    def forward(self, x):
        return self.head(self.rows(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True)) for _ in range(2))
        self.shared = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.shared(x))
        return x


ARCHITECTURES = {
    "linear": lambda: nn.Linear(12, 3),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "mlp": lambda: MLP(12, 3, (8, 8)),
    "rms": lambda: MLP(12, 3, (8,), "gelu", norm="rms"),
    "layer": lambda: MLP(12, 3, (8,), "silu", norm="layer"),
    "batch": lambda: MLP(12, 3, (8,), "tanh", norm="batch"),
    "batch, plain": lambda: nn.Sequential(nn.BatchNorm1d(12, affine=False), nn.Linear(12, 3)),
    "batch, no statistics": lambda: nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    "tabular": lambda: TabularNetwork(12, 2, 8),
    "tabular logits": lambda: TabularNetwork(12, 3, 8, heads=None),
    "prior": lambda: NetworkWithPrior(MLP(12, 3, (8,)), MLP(12, 3, (4,), norm="batch", dropout=0.5), 2.0),
    "functional": Functional,
    "images": Images,
    "residual": Residual,
}


def inputs(name, batch=7):
    return torch.randn(batch, 3, 4) if name == "images" else torch.randn(batch, 12)


def run(network, x, each):
    network.zero_grad()
    xs = x.expand(network.num_indices, *x.shape).clone() if each else x.clone()
    if each:
        xs = xs + torch.arange(network.num_indices, dtype=x.dtype).view(-1, *[1] * x.ndim)
    xs.requires_grad_()
    output = network.forward_each(xs) if each else network(xs)
    # An uneven loss, so that no gradient vanishes by symmetry.
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return output, xs.grad, state_of(network), gradients(network)


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


@settings(max_examples=20, deadline=None)
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
        return MLP(sizes[0], sizes[-1], sizes[1:-1], activation, norm)

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
    network = build(lambda: MLP(2, 1, (4,), norm="batch"), execution, 4)
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
        (torch.tensor([0, 3]), r"`index` to hold member numbers in \[0, 3\), but got values 0 to 3"),
        (torch.tensor([-1]), r"in \[0, 3\), but got values -1 to -1"),
        (
            torch.tensor([0.0]),
            r"`index` to be member numbers, an integer tensor \[Z\], but got torch.float32 of shape \[1\]",
        ),
        (torch.tensor([[0]]), r"an integer tensor \[Z\], but got torch.int64 of shape \[1, 1\]"),
        (torch.zeros(0, dtype=torch.long), r"but got torch.int64 of shape \[0\]"),
        (2, r"an integer tensor \[Z\], but got 2"),
    ],
)
def test_a_bad_index_is_told(execution, index, text):
    with pytest.raises(InputError, match=text):
        build(lambda: nn.Linear(2, 3), execution)(torch.zeros(1, 2), index)


@pytest.mark.parametrize("execution", KINDS)
def test_other_bad_arguments_are_told(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    with pytest.raises(InputError, match=r"`xs` to hold one batch a member, shape \[3, B, ...\], but got \[2, 5, 2\]"):
        network.forward_each(torch.zeros(2, 5, 2))
    with pytest.raises(InputError, match=r"a member number in \[0, 3\), but got 3"):
        network.member(3)
    with pytest.raises(InputError, match=r"a member number in \[0, 3\), but got -1"):
        network.member_state_dict(-1)
    with pytest.raises(InputError, match="`algorithm` to be 'norm' or 'value', but got 'both'"):
        network.clip_gradients_per_member(1.0, "both")
    for members, text in [
        ([], "`members` to hold at least one"),
        ([nn.ReLU(), 3], "item 1 is 3"),
        (nn.Sequential(nn.ReLU()), "a list of modules, but got one Sequential"),
    ]:
        with pytest.raises(InputError, match=text):
            build_ensemble(members, execution)


def test_unknown_execution_is_told():
    with pytest.raises(InputError, match="`execution` to be 'loop', 'stacked', 'vmap' or 'auto', but got 'fast'"):
        build_ensemble([nn.Linear(2, 2)], "fast")


def test_stacked_members_take_a_tensor():
    with pytest.raises(InputError, match="`x` to be a tensor where members are stacked, but got dict"):
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


# ------------------------------------------------------------------------------------------------- state and copies


@pytest.mark.parametrize("name", ["batch", "prior", "functional"])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_a_state_loads_into_every_execution(source, target, name):
    x = torch.randn(5, 12)
    old, new = build(ARCHITECTURES[name], source, seed=1), build(ARCHITECTURES[name], target, seed=2)
    old(x * 2)
    file = io.BytesIO()
    torch.save({"state_dict": nn.ModuleDict({"network": old}).state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["state_dict"]
    assert all(key.startswith("network.members.") for key in loaded)
    nn.ModuleDict({"network": new}).load_state_dict(loaded)
    torch.testing.assert_close(new.eval()(x), old.eval()(x))
    assert_same(state_of(old), state_of(new), rtol=0, atol=0)
    assert old.state_dict()._metadata.keys() >= {f"members.{i}" for i in range(3)}


@pytest.mark.parametrize("execution", KINDS)
def test_state_dict_holds_references(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    network.state_dict()["members.1.bias"].fill_(5.0)
    assert network.member_state_dict(1)["bias"].eq(5).all()
    assert not network.member_state_dict(0)["bias"].eq(5).any()


@pytest.mark.parametrize("execution", KINDS)
def test_strict_loading_names_the_members_keys(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    state = dict(network.state_dict())
    state["members.0.extra"] = state.pop("members.2.bias")
    state["members.1.weight"] = torch.zeros(3, 4)
    with pytest.raises(RuntimeError) as error:
        network.load_state_dict(state)
    told = str(error.value)
    assert 'Missing key(s) in state_dict: "members.2.bias"' in told
    assert 'Unexpected key(s) in state_dict: "members.0.extra"' in told
    assert (
        "size mismatch for members.1.weight: copying a param with shape torch.Size([3, 4]) from checkpoint, the shape in "
        "current model is torch.Size([3, 2])"
    ) in told
    del state["members.1.weight"]
    state["members.0.bias"] = torch.full((3,), 4.0)
    result = network.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == ["members.1.weight", "members.2.bias"]
    assert network.member_state_dict(0)["bias"].eq(4).all()


@pytest.mark.parametrize("execution", KINDS)
def test_assigned_states_take_the_place_of_the_parameters(execution):
    network, x = build(lambda: MLP(2, 3, (4,), norm="batch"), execution, seed=1), torch.randn(5, 2)
    other = build(lambda: MLP(2, 3, (4,), norm="batch"), "loop", seed=2).double()
    network.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(network.eval()(x.double()), other.eval()(x.double()))
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float64 for p in network.parameters())


@pytest.mark.parametrize("execution", AT_ONCE)
def test_a_state_dict_hook_of_a_caller_runs(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    state = {name.replace("members.", "old."): value for name, value in network.state_dict().items()}

    def rename(module, state_dict, prefix, *_):
        for name in list(state_dict):
            state_dict[name.replace("old.", "members.")] = state_dict.pop(name)

    network.register_load_state_dict_pre_hook(rename)
    network.load_state_dict(state)


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), lambda n: pickle.loads(ForkingPickler.dumps(n))]
)
def test_copies_are_whole_and_independent(execution, copier):
    network, x = build(ARCHITECTURES["batch"], execution), torch.randn(5, 12)
    other = copier(network)
    torch.testing.assert_close(other.eval()(x), network.eval()(x), rtol=0, atol=0)
    other.train()(x)
    assert other.execution == execution
    assert other.execution_reason == network.execution_reason
    if copier is copy.deepcopy:
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not network(x).eq(0).all()
    assert not network.training


@pytest.mark.parametrize("execution", KINDS)
def test_an_averaged_model_averages(execution):
    network = build(lambda: nn.Linear(2, 3), execution)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    first = state_of(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    averaged.update_parameters(network)
    state = averaged.state_dict()
    torch.testing.assert_close(state["module.members.1.weight"], first["members.1.weight"] + 0.5)
    x = torch.randn(4, 2)
    torch.testing.assert_close(averaged(x, torch.arange(3)), averaged.module(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize("name", ["layer", "batch", "tabular", "functional"])
def test_networks_of_another_precision(name, execution, dtype):
    network, loop = build(ARCHITECTURES[name], execution).to(dtype), build(ARCHITECTURES[name], "loop").to(dtype)
    x = torch.randn(6, 12, dtype=dtype)
    output, expected = network(x), loop(x)
    assert output.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert all(t.dtype in (dtype, torch.int64) for t in network.state_dict().values())
    assert all(t.dtype in (dtype, torch.int64) for t in network.member(0).state_dict().values())


@pytest.mark.parametrize("execution", KINDS)
def test_members_can_be_taken_out(execution):
    network, x = build(ARCHITECTURES["batch"], execution), torch.randn(6, 12)
    network(x)
    network.eval()
    state = network.state_dict()
    for i in range(3):
        member = network.member(i)
        torch.testing.assert_close(member(x), network(x)[i])
        own = network.member_state_dict(i)
        assert list(own) == list(member.state_dict())
        assert all(torch.equal(own[name], state[f"members.{i}.{name}"]) for name in own)
        assert all(t.is_contiguous() for t in own.values())
    assert (network.member(1) is network.member(1)) == (execution == "loop")
    rebuilt = build_ensemble([network.member(i) for i in range(3)], "loop")
    torch.testing.assert_close(rebuilt(x), network(x))


def test_a_loop_keeps_the_very_members():
    members = [nn.Linear(2, 2) for _ in range(2)]
    network = build_ensemble(members, "loop")
    assert all(network.member(i) is member for i, member in enumerate(members))


@pytest.mark.parametrize("execution", AT_ONCE)
def test_non_persistent_buffers_and_frozen_parameters_stay_so(execution):
    def make():
        network = nn.Linear(2, 2)
        network.register_buffer("offset", torch.randn(2), persistent=False)
        network.bias.requires_grad_(False)
        return network

    network = build(make, execution)
    assert sorted(network.state_dict()) == sorted(build(make, "loop").state_dict())
    assert sorted(tuple(p.shape) for p in network.parameters() if p.requires_grad) == [(3, 2, 2)]
    member = network.member(2)
    assert not member.bias.requires_grad
    assert member.offset.shape == (2,)
    assert "offset" not in member.state_dict()


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("execution", KINDS)
def test_parameter_groups(execution):
    network = build(lambda: nn.Linear(2, 3), execution, 4)
    groups = network.parameter_groups()
    assert network.is_stacked == (execution != "loop")
    assert [p for group in groups for p in group] == list(network.parameters()) if execution != "loop" else True
    if execution == "loop":
        assert [[tuple(p.shape) for p in group] for group in groups] == [[(3, 2), (3,)]] * 4
        assert all(
            a is b for i, group in enumerate(groups) for a, b in zip(group, network.member(i).parameters(), strict=True)
        )
    else:
        assert [[tuple(p.shape) for p in group] for group in groups] == [[(4, 3, 2), (4, 3)]]


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "limit", "norm_type"),
    [("norm", 0.5, 2.0), ("norm", 0.1, float("inf")), ("norm", 1.0, 1.0), ("norm", 1e6, 2.0), ("value", 0.05, 2.0)],
)
def test_clipping_is_each_member_s_own(execution, algorithm, limit, norm_type):
    network = build(Functional, execution, 4).double()
    alone = [copy.deepcopy(network.member(i)) for i in range(4)]
    x = torch.randn(6, 12, dtype=torch.float64)
    scale = torch.tensor([1e-3, 1.0, 100.0, 0.0]).double().view(-1, 1, 1)  # members with very different gradients
    (network(x) * scale).sum().backward()
    norms = network.clip_gradients_per_member(limit, algorithm, norm_type=norm_type)
    expected, expected_norms = {}, []
    for i, member in enumerate(alone):
        (member(x) * scale[i]).sum().backward()
        if algorithm == "norm":
            expected_norms.append(nn.utils.clip_grad_norm_(member.parameters(), limit, norm_type))
        else:
            nn.utils.clip_grad_value_(member.parameters(), limit)
        expected |= {f"members.{i}.{name}": p.grad for name, p in member.named_parameters()}
    actual = gradients(network)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
    if algorithm == "norm":
        torch.testing.assert_close(norms, torch.stack(expected_norms), rtol=1e-9, atol=1e-12)
    else:
        assert norms is None


@pytest.mark.parametrize("execution", KINDS)
def test_clipping_without_gradients_and_with_lightning_s_enumeration(execution):
    from lightning.pytorch.utilities import GradClipAlgorithmType

    network = build(lambda: nn.Linear(2, 3), execution)
    assert network.clip_gradients_per_member(1.0, GradClipAlgorithmType.NORM).tolist() == [0, 0, 0]
    assert network.clip_gradients_per_member(1.0, GradClipAlgorithmType.VALUE) is None


@pytest.mark.parametrize(
    "make_optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.Adam, lr=0.05, fused=True),
        functools.partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
    ],
)
@pytest.mark.parametrize("execution", AT_ONCE)
def test_optimizers_act_per_slice(execution, make_optimizer):
    x, y = torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    states = []
    for kind in ("loop", execution):
        network = build(ARCHITECTURES["batch"], kind).double()
        optimizer = make_optimizer(network.parameters())
        for _ in range(10):
            optimizer.zero_grad()
            (network(x) - y).square().mean((1, 2)).sum().backward()
            network.clip_gradients_per_member(0.3)
            optimizer.step()
        states.append(state_of(network))
    assert_same(*states, rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------------------- precision


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.GroupNorm(2, 4),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3),
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of RMSNorm under autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "execution"), [*((name, kind) for name in ARCHITECTURES for kind in AT_ONCE), ("convolutions", "vmap")]
)
def test_autocast_gives_the_loop_s_types_and_numbers(name, execution, dtype):
    if name == "convolutions":
        make, x = Convolutions, torch.randn(5, 1, 8, 8)
    else:
        make, x = ARCHITECTURES[name], inputs(name)
    loop, other = build(make, "loop"), build(make, execution)
    with torch.autocast("cpu", dtype):
        expected, actual = loop(x), other(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.1, atol=0.1)
    for network, output in ((loop, expected), (other, actual)):
        output.float().square().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in network.parameters())
    assert_same(state_of(loop), state_of(other), rtol=0.05, atol=0.05)


class Scalar(nn.Module):
    """A scalar parameter, which does not widen the type of what it multiplies."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.layer(x) + self.layer.bias[0]


@pytest.mark.parametrize("execution", AT_ONCE)
def test_scalars_keep_the_type_of_their_operand(execution):
    loop, other, x = build(Scalar, "loop"), build(Scalar, execution), torch.randn(5, 4)
    torch.testing.assert_close(other(x), loop(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert loop(x).dtype == other(x).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_convolutions_under_vmap(training):
    loop, other = (build(Convolutions, kind).double().train(training) for kind in ("loop", "vmap"))
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    for each in (False, True):
        expected, actual = (run(copy.deepcopy(network), x, each) for network in (loop, other))
        torch.testing.assert_close(actual[:2], expected[:2])
        assert_same(expected[2], actual[2])
        assert_same(expected[3], actual[3])


# ------------------------------------------------------------------------------------------------- outputs, compile


@pytest.mark.parametrize("execution", KINDS)
def test_what_a_member_returns_is_read(execution):
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "features": x}

    x = torch.randn(4, 2)
    network = build(Dictionary, execution, output=lambda out: out["logits"][:, :2].log_softmax(1))
    expected = torch.stack([F.log_softmax(network.member(i).layer(x)[:, :2], 1) for i in range(3)])
    torch.testing.assert_close(network(x), expected)
    network = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)), execution, output="probs")
    torch.testing.assert_close(network(x).exp().sum(-1), torch.ones(3, 4))


def test_an_output_that_is_no_tensor_is_told():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(
        UnsupportedError, match="the members return a tuple, not one tensor; argument `output` can pick it"
    ):
        build(Pair, "stacked")
    for execution in ("loop", "vmap", "auto"):
        with pytest.raises(InputError, match="returned a tuple, not a tensor. Pass argument `output`"):
            build(Pair, execution)(torch.zeros(1, 2))


@pytest.mark.parametrize("execution", KINDS)
def test_compiled(execution):
    network, x = build(lambda: MLP(12, 3, (4,), norm="batch"), execution), torch.randn(6, 12)
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    torch.testing.assert_close(compiled(x, torch.arange(3)), network(x, torch.arange(3)))
    compiled(x).sum().backward()
    network(x).sum().backward()
    assert_same(state_of(network), state_of(compiled._orig_mod))
    assert_same(gradients(network), gradients(compiled._orig_mod))
    torch.compiler.reset()


@pytest.mark.parametrize("execution", KINDS)
def test_exported(execution):
    skip_on_torch_2_6(VMAP_EXPORT, execution == "vmap")
    network, x = build(lambda: MLP(12, 3, (4,), norm="batch"), execution).eval(), torch.randn(6, 12)
    exported = torch.export.export(network, (x, torch.tensor([2, 0])), strict=False).module()
    torch.testing.assert_close(exported(x, torch.tensor([1, 1])), network(x, torch.tensor([1, 1])))
