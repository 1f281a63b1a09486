"""State dicts, copies, averages, and members that are taken out."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks import (
    MLP,
    DeterministicNetwork,
    EnsembleNetwork,
    StackedEnsembleNetwork,
    build_ensemble,
)
from tests.networks.ensemble.members import (
    ARCHITECTURES,
    AT_ONCE,
    KINDS,
    assert_same,
    build,
    state_of,
)


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
    network, x = build(lambda: MLP(2, 3, hidden_sizes=(4,), norm="batch"), execution, seed=1), torch.randn(5, 2)
    other = build(lambda: MLP(2, 3, hidden_sizes=(4,), norm="batch"), "loop", seed=2).double()
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
    rebuilt = build_ensemble([network.member(i) for i in range(3)], "loop")
    torch.testing.assert_close(rebuilt(x), network(x))


def test_a_loop_keeps_the_very_members():
    members = [nn.Linear(2, 2) for _ in range(2)]
    network = build_ensemble(members, "loop")
    assert all(network.members[i] is member for i, member in enumerate(members))


@pytest.mark.parametrize("execution", KINDS)
def test_a_member_is_a_copy_that_can_be_trained_and_loaded_back(execution):
    network, x = build(lambda: MLP(2, 3, hidden_sizes=(4,), norm="batch"), execution), torch.randn(6, 2)
    before = copy.deepcopy(network.state_dict())
    with torch.inference_mode():
        member = network.member(1)
    optimizer = torch.optim.Adam(member.parameters(), lr=0.1)
    member(x).square().sum().backward()
    optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    network.load_member(1, member)
    for name, value in network.state_dict().items():
        is_its_own = name.startswith("members.1.")
        assert torch.equal(value, member.state_dict()[name[10:]] if is_its_own else before[name])
    torch.testing.assert_close(network.eval()(x)[1], member.eval()(x))


def _another_head(member):
    member[2] = nn.Linear(8, 2)
    return member


def _another_weight(member):
    member[2].weight = nn.Parameter(torch.zeros(2, 8))
    return member


def _assigned(member):
    member.load_state_dict({name: value * 0 for name, value in member.state_dict().items()}, assign=True)
    return member


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize("change", [_another_head, _another_weight, _assigned, copy.deepcopy])
def test_however_a_copy_got_its_weights_they_are_loaded(execution, change):
    network = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), execution)
    member, x = change(network.member(1)), torch.randn(5, 4)
    network.load_member(1, member)
    torch.testing.assert_close(network(x)[1], member(x))


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda member: member[0].requires_grad_(False), "the shape, dtype or requires_grad of '0.weight' differs"),
        (lambda member: member.half(), "the shape, dtype or requires_grad of '0.weight' differs"),
        (lambda member: member.__setitem__(3, nn.Linear(8, 3)), "'3' .Linear. differs in its attribute 'out_features'"),
        (lambda member: member.__setitem__(1, nn.Tanh()), "1 .* has become a Tanh"),
        (lambda member: setattr(member[2], "p", 0.9), "differs in its attribute 'p'"),
        (lambda member: member.append(nn.ReLU()), "the two have different submodules: 4"),
    ],
)  # fmt: skip
def test_what_is_no_weight_is_not_lost_without_a_word(execution, change, message):
    network = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2)), execution)
    change(member := network.member(1))
    with pytest.raises(InputError, match=message):
        network.load_member(1, member)
    network.requires_grad_(False).double()  # the ensemble's own methods reach what is asked for later
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in network.member(1).parameters())
    network.load_member(1, network.member(0))
    assert all(torch.equal(v, network.member_state_dict(0)[k]) for k, v in network.member_state_dict(1).items())


@pytest.mark.parametrize("execution", KINDS)
def test_a_member_that_is_asked_for_follows_moves_and_new_weights(execution):
    network, x = build(lambda: MLP(2, 3, hidden_sizes=(4,)), execution), torch.randn(6, 2)
    network.member(0)
    network.double()
    assert network.member(0)(x.double()).dtype == torch.float64
    for p in network.parameters():
        p.data = p.data * 2
    torch.testing.assert_close(network.member(0)(x.double()), network(x.double())[0])
    network.load_state_dict(build(lambda: MLP(2, 3, hidden_sizes=(4,)), "loop", seed=9).state_dict(), assign=True)
    torch.testing.assert_close(network.member(0)(x), network(x)[0])
    network.requires_grad_(False)
    assert not any(p.requires_grad for p in network.member(0).parameters())
    copied = copy.deepcopy(network.member(0))
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not network.member(0)(x).eq(0).all()


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


def test_unstacked_members_are_copies_that_run_one_by_one():
    network = StackedEnsembleNetwork([nn.Linear(2, 3) for _ in range(4)], output="log_probs")
    loop = network.unstacked()
    assert network.is_stacked
    assert not loop.is_stacked
    assert loop.read_output.output == "log_probs"
    x, index = torch.rand(5, 2), network.evaluation_index(1)
    expected = network(x, index)
    torch.testing.assert_close(loop.evaluate_at(x, index), expected)
    nn.init.zeros_(loop.members[0].weight)
    torch.testing.assert_close(network.evaluate_at(x, index), expected)


@pytest.mark.parametrize("network", [EnsembleNetwork([nn.Linear(2, 3)] * 2), DeterministicNetwork(nn.Linear(2, 3))])
def test_other_networks_need_no_unstacking(network):
    assert network.unstacked() is network
