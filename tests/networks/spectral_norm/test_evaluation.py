"""The bounded weight in evaluation: it is computed once and never stale."""

import copy

import pytest
import torch
from torch import nn

from lightning_uq.networks import spectral_normalize
from tests.networks.spectral_norm.bounded import X, original, small_net, trained


def count_calls(net, monkeypatch):
    """How often a bounded weight is computed."""
    calls = []
    for module in net.modules():
        if hasattr(module, "_divided"):
            inner = module._divided
            monkeypatch.setattr(module, "_divided", lambda *a, inner=inner: calls.append(1) or inner(*a))
    return calls


def test_evaluation_computes_each_weight_once(monkeypatch):
    net = trained().eval()
    calls = count_calls(net, monkeypatch)
    with torch.no_grad():
        first = net(X)
        assert len(calls) == 3
        second = net(X)
    with torch.inference_mode():
        third = net(X)
    assert len(calls) == 3
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    net.eval()
    with torch.no_grad():
        net(X)
    assert len(calls) == 6


def _change_in_place(net):
    with torch.no_grad():
        original(net[5]).mul_(0.1)


def _change_by_data(net):
    original(net[5]).data = 0.1 * original(net[5])


def _change_by_state(net):
    net.load_state_dict(
        {k: 0.1 * v if k == "5.parametrizations.weight.original" else v for k, v in net.state_dict().items()}
    )


def _change_untracked_then_eval(net):
    original(net[5]).data.mul_(0.1)
    net.eval()


def _change_by_training(net):
    net.train()
    optimizer = torch.optim.Adam([original(net[5])], lr=0.5)
    net(X).sum().backward()
    optimizer.step()
    net.eval()


def _change_by_training_flag(net):
    """Lightning sets ``training`` on each module, without a call of ``train``."""
    for module in net.modules():
        module.training = True
    net(X)
    original(net[5]).data.mul_(0.1)
    for module in net.modules():
        module.training = False


@pytest.mark.parametrize(
    "change",
    [
        _change_in_place,
        _change_by_data,
        _change_by_state,
        _change_untracked_then_eval,
        _change_by_training,
        _change_by_training_flag,
    ],
)
def test_a_folded_weight_is_never_stale(change):
    net = trained().eval()
    with torch.no_grad():
        before = net(X)
    change(net)
    with torch.no_grad():
        got = net(X)
        expected = copy.deepcopy(net).eval()(X)
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, expected)


def test_a_swapped_parameter_at_the_same_address_is_seen():
    layer = spectral_normalize(nn.Linear(2, 2, bias=False), coefficient=100.0).eval()
    outputs = []
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0):
            swapped = {"parametrizations.weight.original": torch.full((2, 2), value)}
            outputs.append(torch.func.functional_call(layer, swapped, torch.ones(1, 2)).sum().item())
            del swapped
    assert outputs == [4.0, 8.0, 12.0]


def test_a_network_built_in_inference_mode():
    with torch.inference_mode():
        net = spectral_normalize(small_net(), coefficient=0.3).eval()
        first = net(X)
        original(net[5]).mul_(0.1)
        assert not torch.allclose(net(X), first)


@pytest.mark.parametrize("training", [False, True])
def test_vmap_over_stacked_parameters(training):
    nets = [spectral_normalize(nn.Sequential(nn.Linear(2, 3)), coefficient=0.1) for _ in range(2)]
    for net in nets:
        net(torch.ones(1, 2))
        net.train(training)
    base = copy.deepcopy(nets[0])
    with torch.no_grad():
        stacked = torch.func.stack_module_state(nets)
        call = torch.vmap(lambda *state: torch.func.functional_call(base, state, torch.ones(1, 2)))
        torch.testing.assert_close(call(*stacked), torch.stack([net(torch.ones(1, 2)) for net in nets]))


def test_gradients_flow_in_evaluation_and_match_training():
    net = trained(steps=50).eval()
    net(X).sum().backward()
    assert original(net[0]).grad.abs().sum() > 0
    assert torch.isfinite(original(net[0]).grad).all()


def test_a_frozen_network_folded_in_inference_mode_gives_input_gradients():
    net = trained().requires_grad_(False).eval()
    with torch.inference_mode():
        net(X)
    x = X.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_first_forward_in_inference_mode_leaves_a_trainable_network():
    net = spectral_normalize(small_net(), coefficient=0.3)
    with torch.inference_mode():
        net.eval()(X)
    net.train()(X).sum().backward()
    assert original(net[0]).grad is not None


def test_reading_the_weight_in_evaluation_takes_no_step():
    net = trained().eval()
    state = copy.deepcopy(net.state_dict())
    for _ in range(3):
        net(X)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
