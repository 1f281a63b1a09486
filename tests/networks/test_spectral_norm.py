import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_uq.errors import InputError, NotFittedError, UnsupportedError
from lightning_uq.networks.spectral_norm import _ConvolutionNorm, remove_spectral_norm, spectral_normalize

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = sorted(path.stem.removeprefix("ddu_") for path in REFERENCE.glob("ddu_sn*.npz"))


def norm_of(layer):
    """The parametrization of a bounded layer."""
    return layer.parametrizations.weight[0]


def original(layer):
    return layer.parametrizations.weight.original


def dense(layer, weight, size):
    """The linear operator of ``layer`` with ``weight`` as a matrix, one column an input element."""
    plain = copy.deepcopy(layer)
    if parametrize.is_parametrized(plain):
        parametrize.remove_parametrizations(plain, "weight", leave_parametrized=False)
        plain._forward_pre_hooks.clear()
    plain = plain.double()
    plain.bias = None
    with torch.no_grad():
        plain.weight.copy_(weight)
        shape = (layer.in_channels, *size)
        basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        return plain(basis).flatten(1).T


def true_norm(layer, size, weight=None):
    return torch.linalg.matrix_norm(dense(layer, layer.weight if weight is None else weight, size), 2).item()


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1, stride=2),
        nn.Flatten(),
        nn.Linear(27, 5),
    )


X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(net=None, coeff=0.3, steps=3, **kwargs):
    net = spectral_normalize(small_net() if net is None else net, coeff=coeff, **kwargs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    return net


# ------------------------------------------------------------------------------------------ the original's numbers


@pytest.mark.parametrize("case", CASES)
def test_the_original_numbers_are_met(case):
    ref = {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(REFERENCE / f"ddu_{case}.npz").items()}
    weight = ref["weight_orig"]
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.bias.data.copy_(ref["bias"])
    else:
        stride = ref.get("stride", 2 if "conv1x1" in case else 1)
        kernel = weight.shape[-1]
        layer = nn.Conv2d(weight.shape[1], len(weight), kernel, stride, kernel // 2, bias=False)
    layer.weight.data.copy_(weight)
    spectral_normalize(
        layer,
        ref["coeff"],
        ref["n_power_iterations"],
        conv_norm="reshaped" if "reshape" in case else "operator",
        n_warmup_iterations=0,
        eps=1e-5,
    )
    norm = norm_of(layer)
    if isinstance(norm, _ConvolutionNorm):
        norm.learn_size(ref["x"].shape[2:])
    norm.u.copy_(ref["u_init"].view_as(norm.u))
    norm.v.copy_(ref["v_init"].view_as(norm.v))

    def check(name, got):
        torch.testing.assert_close(got.detach().reshape(ref[name].shape), ref[name], rtol=1e-5, atol=1e-6, msg=name)

    layer.eval()
    check("eval0_out", layer(ref["x"]))
    check("eval0_weight", layer.weight)
    check("eval0_sigma", (norm.u * norm.operator(original(layer), norm.v)).sum())
    layer.train()
    for step in range(1, 31):
        out = layer(ref["x"])
        if f"t{step}_u" in ref:
            u, v = norm.u.clone(), norm.v.clone()
            for name, got in {"u": u, "v": v, "sigma": norm.sigma, "out": out}.items():
                check(f"t{step}_{name}", got)
            check(f"t{step}_weight", norm.eval()(original(layer)))  # a look that takes no step
            norm.train()
    (out * ref["grad_R"]).sum().backward()
    check("t30_grad_weight_orig", original(layer).grad)
    layer.eval()
    check("eval30_out", layer(ref["x"]))
    check("eval30_weight", layer.weight)
    truth = ref["true_norm"] if "true_norm" in ref else ref["true_operator_norm"]
    # Thirty steps from below.
    assert truth * 0.998 < norm.sigma.item() < truth * (1 + 1e-5)


def test_the_reshaped_kernel_is_no_bound_of_the_operator():
    ref = np.load(REFERENCE / "ddu_snconv_s1_active.npz")
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    layer.weight.data.copy_(torch.from_numpy(ref["weight_orig"]))
    for how, expected in (("reshaped", ref["reshape_norm"]), ("operator", ref["true_operator_norm"])):
        bounded = spectral_normalize(copy.deepcopy(layer), conv_norm=how, n_warmup_iterations=4000).eval()
        bounded(torch.from_numpy(ref["x"]))
        assert norm_of(bounded).sigma.item() == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------ the definition

GEOMETRIES = [
    ({"kernel_size": 3, "padding": 1}, (6, 5)),
    ({"kernel_size": 3, "padding": 1, "stride": 3}, (7, 8)),
    ({"kernel_size": 5, "padding": 2, "stride": 4}, (9, 8)),
    ({"kernel_size": (3, 1), "padding": (0, 1), "stride": (2, 3)}, (6, 7)),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}, (6, 6)),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2, "groups": 4}, (5, 6)),
    ({"kernel_size": 1, "groups": 2}, (3, 3)),
    ({"kernel_size": 1, "stride": 2, "padding": 1}, (5, 4)),
    ({"kernel_size": 4, "padding": "same"}, (6, 5)),
    ({"kernel_size": 2, "padding": "valid"}, (5, 5)),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (5, 4)),
    ({"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "reflect"}, (5, 6)),
    ({"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}, (5, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("arguments", "size"), GEOMETRIES, ids=[str(a) for a, _ in GEOMETRIES])
def test_the_bound_is_that_of_the_operator_in_every_geometry(arguments, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **arguments).double()
    nn.init.normal_(layer.weight)
    truth = true_norm(layer, size)
    spectral_normalize(layer, coeff=0.7, n_warmup_iterations=4000).eval()
    layer(torch.zeros(1, 4, *size, dtype=torch.float64))
    assert norm_of(layer).sigma.item() == pytest.approx(truth, rel=1e-6)
    assert true_norm(layer, size) == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (4, 3, 5))])
def test_one_and_three_dimensions(kind, size):
    torch.manual_seed(0)
    layer = kind(2, 3, 3, stride=2, padding=1).double()
    truth = true_norm(layer, size)
    spectral_normalize(layer, n_warmup_iterations=4000).eval()
    layer(torch.zeros(2, *size, dtype=torch.float64))  # without a batch axis
    assert norm_of(layer).sigma.item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("arguments", "size"), GEOMETRIES, ids=[str(a) for a, _ in GEOMETRIES])
def test_operator_and_adjoint_are_the_layer_and_its_transpose(arguments, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **arguments).double()
    matrix = dense(layer, layer.weight, size)
    spectral_normalize(layer)
    norm = norm_of(layer)
    v = torch.randn(4, *size, dtype=torch.float64)
    if not isinstance(norm, _ConvolutionNorm):
        return  # one element: the matrix of the kernel stands for the operator
    norm.learn_size(size)
    u = torch.randn(norm.u.shape, dtype=torch.float64)
    torch.testing.assert_close(norm.operator(original(layer), v).flatten(), matrix @ v.flatten())
    torch.testing.assert_close(norm.adjoint(original(layer), u).flatten(), matrix.T @ u.flatten())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 5), st.floats(0.01, 100), st.integers(0, 1000))
def test_a_linear_layer_ends_within_the_bound_and_keeps_its_direction(rows, columns, coeff, scale, seed):
    layer = nn.Linear(columns, rows).double()
    with torch.no_grad():
        weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
        layer.weight.copy_(weight)
    spectral_normalize(layer, coeff, n_warmup_iterations=1000).eval()
    sigma = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(layer.weight, weight / max(1, sigma / coeff), rtol=5e-3, atol=0)
    if sigma < coeff:
        assert torch.equal(layer.weight, weight)


def test_the_bound_follows_weights_that_train():
    net = trained(coeff=0.2, steps=40)
    assert original(net[0]).grad.abs().sum() > 0
    net.eval()
    assert true_norm(net[0], (6, 6)) == pytest.approx(0.2, rel=0.01)
    assert torch.linalg.matrix_norm(net[5].weight, 2).item() == pytest.approx(0.2, rel=0.01)


def test_the_gradient_takes_u_and_v_as_constants():
    layer = spectral_normalize(nn.Linear(3, 4).double(), coeff=0.1)
    probe = torch.randn(4, 3, dtype=torch.float64)
    norm, weight = norm_of(layer), original(layer)
    (layer.weight * probe).sum().backward()
    u, v = norm.u, norm.v
    sigma = u @ weight @ v
    expected = 0.1 * (probe / sigma - (probe * weight).sum() / sigma**2 * torch.outer(u, v))
    torch.testing.assert_close(weight.grad, expected.detach())


def test_two_forwards_before_one_backward():
    layer = spectral_normalize(nn.Conv2d(1, 2, 3), coeff=0.1)
    x = torch.randn(2, 1, 5, 5)
    (layer(x).sum() - 2 * layer(x).square().sum()).backward()
    assert original(layer).grad.isfinite().all()


def test_batchnorm_is_bounded_on_request():
    net = small_net()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([5.0, -9.0, 1.0, 0.5]))
    assert not parametrize.is_parametrized(spectral_normalize(copy.deepcopy(net))[1])
    spectral_normalize(net, coeff=2.0, bound_batchnorm=True)
    for _ in range(3):
        net(X)
    net.eval()
    stretch = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).abs()
    assert stretch.max().item() == pytest.approx(2.0, rel=1e-5)
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        change = net[1](x) - net[1](torch.zeros_like(x))
    assert (change.norm() / x.norm()).item() <= 2 + 1e-5
    assert set(net.state_dict()) == set(
        torch.load(io.BytesIO(_saved(net.state_dict())), weights_only=True)
    )  # the layer is no submodule of its own bound
    with torch.no_grad():
        before = net(X)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(X), before)
        torch.testing.assert_close(copy.deepcopy(net)(X), before)
        torch.testing.assert_close(remove_spectral_norm(net)(X), before)


def test_a_copied_batchnorm_reads_its_own_variance():
    layer = spectral_normalize(nn.BatchNorm1d(3), coeff=0.5, bound_batchnorm=True)
    copied = copy.deepcopy(layer)
    layer.running_var.fill_(100.0)
    torch.testing.assert_close(copied.weight, torch.full((3,), 0.5 * math.sqrt(1 + 1e-5)))
    torch.testing.assert_close(layer.weight, torch.ones(3))


# ------------------------------------------------------------------------------------------ sizes


def test_nothing_is_bounded_before_the_size_is_known():
    layer = spectral_normalize(nn.Conv2d(1, 1, 3, bias=False), coeff=1e-3)
    assert torch.equal(layer.weight, original(layer))
    with pytest.raises(NotFittedError, match="conv has not"):
        remove_spectral_norm(nn.ModuleDict({"conv": layer}))
    layer.eval()(torch.ones(1, 1, 4, 4))
    assert layer.weight.abs().max() < original(layer).abs().max()


def test_another_size_is_learnt_in_training_and_ignored_in_evaluation():
    torch.manual_seed(0)
    layer = spectral_normalize(nn.Conv2d(2, 2, 3, padding=1, bias=False), coeff=0.1)
    layer.eval()(torch.zeros(1, 2, 8, 8))
    weight = layer.weight.detach()
    layer(torch.zeros(1, 2, 5, 7))
    assert torch.equal(layer.weight, weight)
    assert norm_of(layer).v.shape == (2, 8, 8)
    sigma = norm_of(layer).sigma.item()
    buffer = norm_of(layer).v
    layer.train()(torch.zeros(1, 2, 12, 9))
    assert norm_of(layer).v.shape == (2, 12, 9)
    assert norm_of(layer).v is buffer  # DDP keeps a list of these
    # A larger input cannot be stretched less: the old vector, padded, is the start.
    assert norm_of(layer).sigma.item() >= sigma * (1 - 1e-5)
    layer(torch.zeros(1, 2, 3, 4))
    assert true_norm(layer, (3, 4)) == pytest.approx(0.1, rel=0.05)


def test_a_vanished_weight_comes_back_under_the_bound():
    for layer, x in ((nn.Linear(3, 3), torch.ones(1, 3)), (nn.Conv2d(3, 3, 3), torch.ones(1, 3, 4, 4))):
        weight = layer.weight.detach().clone()
        with torch.no_grad():
            spectral_normalize(layer, coeff=0.1, n_power_iterations=30)
            original(layer).zero_()
            assert layer(x).isfinite().all()
            original(layer).copy_(weight)
            layer(x)
            assert norm_of(layer).sigma > 0.2
            original(layer).fill_(float("nan"))
            layer(x)
            original(layer).copy_(weight)
            assert layer(x).isfinite().all()


# ------------------------------------------------------------------------------------------ random state


def test_the_global_random_state_is_neither_used_nor_moved():
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        net = small_net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        spectral_normalize(net)(X)
        assert torch.equal(before, torch.get_rng_state())
        states.append(net.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# ------------------------------------------------------------------------------------------ folded in evaluation


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
    layer = spectral_normalize(nn.Linear(2, 2, bias=False), coeff=100.0).eval()
    outputs = []
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0):
            swapped = {"parametrizations.weight.original": torch.full((2, 2), value)}
            outputs.append(torch.func.functional_call(layer, swapped, torch.ones(1, 2)).sum().item())
            del swapped
    assert outputs == [4.0, 8.0, 12.0]


def test_a_network_built_in_inference_mode():
    with torch.inference_mode():
        net = spectral_normalize(small_net(), coeff=0.3).eval()
        first = net(X)
        original(net[5]).mul_(0.1)
        assert not torch.allclose(net(X), first)


@pytest.mark.parametrize("training", [False, True])
def test_vmap_over_stacked_parameters(training):
    nets = [spectral_normalize(nn.Sequential(nn.Linear(2, 3)), coeff=0.1) for _ in range(2)]
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
    net = spectral_normalize(small_net(), coeff=0.3)
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


# ------------------------------------------------------------------------------------------ copies and files


def _saved(obj):
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: torch.load(io.BytesIO(_saved(net)), weights_only=False),
    "twice": lambda net: pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(net))))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("after", ["construction", "training", "evaluation"])
def test_copies_compute_the_same_and_go_their_own_way(how, after):
    net = spectral_normalize(small_net(), 0.3, bound_batchnorm=True)
    if after != "construction":
        net(X)
        net(X).sum().backward()
        net.zero_grad()
    if after == "evaluation":
        with torch.no_grad():
            net.eval()(X)
    copied = COPIES[how](net)
    assert isinstance(copied[0], nn.Conv2d)
    with torch.no_grad():
        torch.testing.assert_close(copied.eval()(X), net.eval()(X))
    if how == "copy":
        return
    copied.train()
    copied(X).sum().backward()
    assert original(net[0]).grad is None
    assert original(copied[0]).grad is not None
    with torch.no_grad():
        original(net[5]).mul_(0.1)
        net.eval()(X)
        assert not torch.allclose(copied.eval()(X), net(X))
    plain = remove_spectral_norm(copied)
    assert not plain[0]._forward_pre_hooks
    assert not plain[0]._load_state_dict_pre_hooks
    assert type(plain[0]) is nn.Conv2d
    if after != "construction":
        assert parametrize.is_parametrized(net[0])
        remove_spectral_norm(net)
        assert not net[0]._forward_pre_hooks


def test_an_optimizer_pickled_with_the_network_keeps_its_parameters():
    net = trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}


def test_an_optimizer_made_before_goes_on():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    spectral_normalize(net)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("into", ["fresh", "used", "used at another size"])
def test_a_state_dict_goes_through_a_file(into):
    net = trained().eval()
    state = torch.load(io.BytesIO(_saved(net.state_dict())), weights_only=True)
    other = spectral_normalize(small_net(), coeff=0.3)
    if into == "used":
        other(X)
        with torch.no_grad():
            other.eval()(X)
    if into == "used at another size":
        other[:3](torch.zeros(1, 2, 9, 7))
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), net(X), rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_state_from_before_the_first_forward_unlearns_the_size():
    net = spectral_normalize(small_net(), coeff=0.3)
    early = copy.deepcopy(net.state_dict())
    net(X)
    net.load_state_dict(early)
    assert not norm_of(net[0]).is_sized
    fresh = spectral_normalize(small_net(), coeff=0.3)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(X), fresh.eval()(X))


def test_a_plain_state_is_warmed_up_anew():
    net = trained(coeff=0.3, n_warmup_iterations=300)
    plain = small_net()
    with torch.no_grad():
        plain[5].weight.mul_(20)
    net.load_state_dict(plain.state_dict())
    net.eval()(X)
    assert torch.linalg.matrix_norm(net[5].weight, 2).item() == pytest.approx(0.3, rel=1e-4)
    assert torch.equal(original(net[5]), plain[5].weight)


def original_state(net, size=(6, 6)):
    """What the original code would have saved for ``small_net`` with 3x3 kernels bounded by conv, others as a matrix."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, value in net.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and value.ndim > 1:
            state[f"{name}.weight_orig"] = torch.randn(value.shape, generator=generator)
            rows, columns = value.flatten(1).shape
            if value.shape[-1] == 3:
                rows, columns = len(value) * math.prod(size), value.shape[1] * math.prod(size)
            state[f"{name}.weight_u"] = torch.randn(rows, generator=generator)
            state[f"{name}.weight_v"] = torch.randn(columns, generator=generator)
            state[f"{name}.weight_sigma"] = torch.rand(1, generator=generator) + 1
        else:
            state[key] = value
    return state


def test_the_original_keys_are_read():
    state = original_state(small_net())
    net = spectral_normalize(small_net(), coeff=0.3)
    net.load_state_dict(state)
    assert "0.weight_orig" in state  # the caller's own mapping is left alone
    for i in (0, 3, 5):
        torch.testing.assert_close(original(net[i]), nn.Parameter(state[f"{i}.weight_orig"]))
        for key in ("u", "v", "sigma"):
            assert torch.equal(getattr(norm_of(net[i]), key).flatten(), state[f"{i}.weight_{key}"])
    assert norm_of(net[0]).v.shape == (2, 6, 6)
    net.eval()(X)
    assert torch.equal(norm_of(net[0]).u.flatten(), state["0.weight_u"])  # no warm-up over what was loaded


def test_original_keys_that_do_not_fit_are_told():
    net = spectral_normalize(small_net())
    with pytest.raises(RuntimeError, match=r"`0.weight_u` and `0.weight_v` are not of a square input"):
        net.load_state_dict(original_state(small_net(), (6, 5)))
    net[0](torch.zeros(1, 2, 6, 5))
    net[0].load_state_dict({k[2:]: v for k, v in original_state(small_net(), (6, 5)).items() if k.startswith("0.")})
    assert norm_of(net[0]).v.shape == (2, 6, 5)
    state = original_state(small_net())
    del state["0.weight_v"]
    with pytest.raises(RuntimeError, match=r"0\.weight_v"):
        net.load_state_dict(state)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("copied", ["before the first forward", "after it"])
def test_a_weight_average_follows(use_buffers, copied):
    net = spectral_normalize(small_net(), coeff=0.2)
    if copied == "after it":
        net(X)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
        average.update_parameters(net)
    average.eval()
    with torch.no_grad():
        average(X)
    inner = average.module
    assert true_norm(inner[0], (6, 6)) == pytest.approx(0.2, rel=0.02)
    assert torch.linalg.matrix_norm(inner[5].weight, 2).item() == pytest.approx(0.2, rel=0.02)
    state = torch.load(io.BytesIO(_saved(average.state_dict())), weights_only=True)
    other = AveragedModel(spectral_normalize(small_net(), coeff=0.2))
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), average(X))


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = spectral_normalize(small_net(), coeff=0.2, bound_batchnorm=True)
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        fresh = pickle.loads(pickle.dumps(self.net)).eval()
        self.seen.append((self.net(batch), fresh(batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_lightning_with_a_weight_average():
    module = Regression()
    data = torch.utils.data.DataLoader(X, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    trainer.fit(module, data, data)
    trainer.validate(module, data, verbose=False)
    assert len(module.seen) == 2 * 6  # with the sanity check
    # The average is written through ``.data``, after ``eval()``: none of the outputs came from a weight folded before.
    for got, expected in module.seen:
        torch.testing.assert_close(got, expected)
    assert true_norm(module.net[0], (6, 6)) == pytest.approx(0.2, rel=0.1)


def test_copies_made_before_the_first_forward_are_otherwise_independent():
    first = spectral_normalize(small_net(), coeff=0.3, n_warmup_iterations=300)
    second = copy.deepcopy(first)
    with torch.no_grad():
        original(second[0]).normal_()
        first.eval()(X)
        second.eval()(X)
    assert true_norm(second[0], (6, 6)) == pytest.approx(0.3, rel=1e-3)  # warmed up with its own weights
    assert true_norm(first[0], (6, 6)) == pytest.approx(0.3, rel=1e-3)
    second.train()(torch.zeros(2, 2, 6, 6))
    assert not torch.equal(norm_of(first[0]).v, norm_of(second[0]).v)


# ------------------------------------------------------------------------------------------ precision, compile, ranks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_keep_the_power_iteration_precise(dtype):
    net = spectral_normalize(small_net(), coeff=0.3, n_warmup_iterations=1000).to(dtype)
    net(X.to(dtype))
    norm = norm_of(net[0])
    assert net[0].weight.dtype == dtype
    assert norm.v.dtype == norm.sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm_of(spectral_normalize(nn.Linear(2, 2, dtype=dtype))).v.dtype == norm.v.dtype
    truth = true_norm(net[0], (6, 6), weight=original(net[0]))
    assert norm.sigma.item() == pytest.approx(truth, rel=1e-4)
    net.eval()
    with torch.no_grad():
        net(X.to(dtype))
        assert net[0].weight.dtype == dtype
        assert net.float()(X).dtype == torch.float32  # the folded weight moved along


def test_autocast_does_not_touch_the_norm():
    net = spectral_normalize(small_net(), coeff=0.3)
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(X)
    assert out.dtype == torch.bfloat16
    plain(X)
    for i in (0, 3, 5):
        assert torch.equal(norm_of(net[i]).sigma, norm_of(plain[i]).sigma)
    out.float().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        net.eval()(X)
        assert net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("sized", [False, True])
def test_compiled_networks_agree(sized):
    net = spectral_normalize(small_net(), coeff=0.3)
    if sized:
        net(X)
    expected, got = copy.deepcopy(net), net
    torch._dynamo.reset()
    compiled = torch.compile(got, backend="aot_eager")
    for _ in range(2):
        want, have = expected(X), compiled(X)
        torch.testing.assert_close(have, want)
        want.sum().backward()
        have.sum().backward()
    torch.testing.assert_close(original(got[0]).grad, original(expected[0]).grad)
    torch.testing.assert_close(norm_of(got[0]).v, norm_of(expected[0]).v)
    expected.eval()
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected(X))
        original(got[5]).mul_(3)
        original(expected[5]).mul_(3)
        torch.testing.assert_close(compiled(X), expected(X))


def test_gradient_checkpointing():
    net = trained()
    torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False).sum().backward()
    assert original(net[0]).grad.isfinite().all()


ONE_RANK = """
import os
import sys
import torch
from torch import nn
from lightning_uq.networks.spectral_norm import spectral_normalize

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)  # ranks need not share a seed
net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
net = nn.parallel.DistributedDataParallel(spectral_normalize(net, coeff=0.3, bound_batchnorm=True))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(2, 2, 6, 6)).square().sum().backward()
    optimizer.step()
net.eval()
with torch.no_grad():
    net(torch.randn(2, 2, 6, 6))  # rank 0's buffers arrive
torch.save(net.module.state_dict(), f"{folder}/{rank}.pt")
os._exit(0)  # at once: see tests/conftest.py
"""


def test_two_ranks_agree(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", ONE_RANK, str(tmp_path), str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["0.parametrizations.weight.0.v"].shape == (2, 6, 6)
    for key in first:
        torch.testing.assert_close(first[key], second[key], msg=key)


# ------------------------------------------------------------------------------------------ other people's networks


def test_torchvision():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=3)
    plain = {key: value.shape for key, value in net.state_dict().items()}
    spectral_normalize(net, coeff=0.5, exclude=["fc"])
    bounded = [name for name, layer in net.named_modules() if parametrize.is_parametrized(layer, "weight")]
    assert len(bounded) == 20
    assert "fc" not in bounded
    x = torch.randn(2, 3, 32, 32)
    net(x).sum().backward()
    net.eval()
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(remove_spectral_norm(net)(x), expected)
    assert {key: value.shape for key, value in net.state_dict().items()} == plain
    net.load_state_dict(resnet18(num_classes=3).state_dict())


def test_timm():
    timm = pytest.importorskip("timm")
    net = spectral_normalize(timm.create_model("resnet18", num_classes=3), coeff=0.5, exclude=["fc"])
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        pickle.loads(pickle.dumps(net)).eval()(torch.randn(2, 3, 32, 32))


def test_a_shared_layer_and_an_attention_block():
    shared = nn.Linear(4, 4)
    net = spectral_normalize(nn.Sequential(shared, nn.ReLU(), shared), coeff=0.1)
    net(torch.ones(1, 4))
    assert len(list(net.parameters())) == 2
    block = spectral_normalize(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), coeff=0.1, n_warmup_iterations=200
    )
    block.eval()
    with torch.no_grad():
        assert block(torch.randn(2, 3, 8)).isfinite().all()
    assert torch.linalg.matrix_norm(block.self_attn.out_proj.weight, 2).item() == pytest.approx(0.1, rel=1e-3)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coeff": 0.0}, "Expected argument `coeff` to be a positive number, but got 0.0."),
        ({"coeff": float("nan")}, "Expected argument `coeff` to be a positive number, but got nan."),
        ({"n_power_iterations": 0}, "Expected argument `n_power_iterations` to be at least 1, but got 0."),
        ({"n_warmup_iterations": -1}, "Expected argument `n_warmup_iterations` to be at least 0, but got -1."),
        ({"eps": -1.0}, "Expected argument `eps` to be at least 0, but got -1.0."),
        ({"conv_norm": "true"}, "Expected argument `conv_norm` to be 'operator' or 'reshaped', but got 'true'."),
        ({"exclude": ["fc"]}, "Expected argument `exclude` to hold names of submodules, but there is no 'fc'."),
        ({"exclude": ["0", "3", "5"]}, "Expected argument `module` to hold a linear layer or a convolution to bound"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError) as info:
        spectral_normalize(small_net(), **arguments)
    assert str(info.value).startswith(message)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ConvTranspose2d(1, 1, 3), "no transposed convolutions, but last is one"),
        (lambda: OwnForward(1, 1, 3), "last is a OwnForward with its own forward"),
        (lambda: nn.LazyLinear(3), "last is not initialized yet"),
        (weight_normed, "The weight of last is no parameter"),
        (lambda: nn.BatchNorm1d(2, affine=False), "`bound_batchnorm` needs a BatchNorm with a scale"),
        (lambda: nn.BatchNorm1d(2, track_running_stats=False), "`bound_batchnorm` needs a BatchNorm with a scale"),
    ],
)
def test_layers_that_cannot_be_bounded(make, message):
    net = nn.ModuleDict({"first": nn.Linear(2, 2), "last": make()})
    with pytest.raises(UnsupportedError, match=message):
        spectral_normalize(net, bound_batchnorm=True)
    assert not parametrize.is_parametrized(net["first"])  # nothing half done
    spectral_normalize(net, bound_batchnorm=True, exclude=["last"])


def test_twice_is_an_error():
    net = spectral_normalize(small_net())
    with pytest.raises(InputError, match="not spectral-normalized yet, but 0 is"):
        spectral_normalize(net)
    with pytest.raises(InputError, match="to be spectral-normalized, but no layer of it is"):
        remove_spectral_norm(small_net())


def test_on_top_of_another_parametrization():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    spectral_normalize(layer, coeff=0.1, n_warmup_iterations=300).eval()
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.1, rel=1e-4)
