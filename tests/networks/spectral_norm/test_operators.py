"""The norm of each layer: the original numbers, the definition, and the sizes of inputs."""

import copy
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from lightning_uq.errors import NotFittedError
from lightning_uq.networks import remove_spectral_norm, spectral_normalize
from lightning_uq.networks.spectral_norm.convolution import ConvolutionNorm
from tests.networks.spectral_norm.bounded import X, dense, norm_of, original, saved, small_net, trained, true_norm

REFERENCE = Path(__file__).parents[2] / "reference"
CASES = sorted(path.stem.removeprefix("ddu_") for path in REFERENCE.glob("ddu_sn*.npz"))


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
        coefficient=ref["coeff"],
        n_power_iterations=ref["n_power_iterations"],
        conv_norm="reshaped" if "reshape" in case else "operator",
        n_warmup_iterations=0,
        eps=1e-5,
    )
    norm = norm_of(layer)
    if isinstance(norm, ConvolutionNorm):
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
    ({"kernel_size": 1, "padding": "same", "padding_mode": "circular"}, (3, 4)),
    *(
        ({"kernel_size": 1, "padding": 1, "padding_mode": mode}, (4, 3))
        for mode in ("replicate", "circular", "reflect")
    ),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("arguments", "size"), GEOMETRIES, ids=[str(a) for a, _ in GEOMETRIES])
def test_the_bound_is_that_of_the_operator_in_every_geometry(arguments, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **arguments).double()
    nn.init.normal_(layer.weight)
    truth = true_norm(layer, size)
    spectral_normalize(layer, coefficient=0.7, n_warmup_iterations=4000).eval()
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
    if not isinstance(norm, ConvolutionNorm):
        return  # one element: the matrix of the kernel stands for the operator
    norm.learn_size(size)
    u = torch.randn(norm.u.shape, dtype=torch.float64)
    torch.testing.assert_close(norm.operator(original(layer), v).flatten(), matrix @ v.flatten())
    torch.testing.assert_close(norm.adjoint(original(layer), u).flatten(), matrix.T @ u.flatten())
    (slope,) = torch.autograd.grad((u * norm.operator(original(layer), v)).sum(), original(layer))
    torch.testing.assert_close(norm.gradient(original(layer), u, v), slope)


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 5), st.floats(0.01, 100), st.integers(0, 1000))
def test_a_linear_layer_ends_within_the_bound_and_keeps_its_direction(rows, columns, coefficient, scale, seed):
    layer = nn.Linear(columns, rows).double()
    with torch.no_grad():
        weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
        layer.weight.copy_(weight)
    spectral_normalize(layer, coefficient=coefficient, n_warmup_iterations=1000).eval()
    sigma = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(layer.weight, weight / max(1, sigma / coefficient), rtol=5e-3, atol=0)
    if sigma < coefficient:
        assert torch.equal(layer.weight, weight)


def test_the_bound_follows_weights_that_train():
    net = trained(coefficient=0.2, steps=40)
    assert original(net[0]).grad.abs().sum() > 0
    net.eval()
    assert true_norm(net[0], (6, 6)) == pytest.approx(0.2, rel=0.01)
    assert torch.linalg.matrix_norm(net[5].weight, 2).item() == pytest.approx(0.2, rel=0.01)


def test_the_gradient_takes_u_and_v_as_constants():
    layer = spectral_normalize(nn.Linear(3, 4).double(), coefficient=0.1)
    probe = torch.randn(4, 3, dtype=torch.float64)
    norm, weight = norm_of(layer), original(layer)
    (layer.weight * probe).sum().backward()
    u, v = norm.u, norm.v
    sigma = u @ weight @ v
    expected = 0.1 * (probe / sigma - (probe * weight).sum() / sigma**2 * torch.outer(u, v))
    torch.testing.assert_close(weight.grad, expected.detach())


def test_two_forwards_before_one_backward():
    layer = spectral_normalize(nn.Conv2d(1, 2, 3), coefficient=0.1)
    x = torch.randn(2, 1, 5, 5)
    (layer(x).sum() - 2 * layer(x).square().sum()).backward()
    assert original(layer).grad.isfinite().all()


def test_batchnorm_is_bounded_on_request():
    net = small_net()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([5.0, -9.0, 1.0, 0.5]))
    assert not parametrize.is_parametrized(spectral_normalize(copy.deepcopy(net))[1])
    spectral_normalize(net, coefficient=2.0, bound_batchnorm=True)
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
        torch.load(io.BytesIO(saved(net.state_dict())), weights_only=True)
    )  # the layer is no submodule of its own bound
    with torch.no_grad():
        before = net(X)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(X), before)
        torch.testing.assert_close(copy.deepcopy(net)(X), before)
        torch.testing.assert_close(remove_spectral_norm(net)(X), before)


def test_a_copied_batchnorm_reads_its_own_variance():
    layer = spectral_normalize(nn.BatchNorm1d(3), coefficient=0.5, bound_batchnorm=True)
    copied = copy.deepcopy(layer)
    layer.running_var.fill_(100.0)
    torch.testing.assert_close(copied.weight, torch.full((3,), 0.5 * math.sqrt(1 + 1e-5)))
    torch.testing.assert_close(layer.weight, torch.ones(3))


def test_nothing_is_bounded_before_the_size_is_known():
    layer = spectral_normalize(nn.Conv2d(1, 1, 3, bias=False), coefficient=1e-3)
    assert torch.equal(layer.weight, original(layer))
    with pytest.raises(NotFittedError, match="The norm of conv depends on the size of its input"):
        remove_spectral_norm(nn.ModuleDict({"conv": layer}))
    layer.eval()(torch.ones(1, 1, 4, 4))
    assert layer.weight.abs().max() < original(layer).abs().max()


def test_another_size_is_learnt_in_training_and_ignored_in_evaluation():
    torch.manual_seed(0)
    layer = spectral_normalize(nn.Conv2d(2, 2, 3, padding=1, bias=False), coefficient=0.1)
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
            spectral_normalize(layer, coefficient=0.1, n_power_iterations=30)
            original(layer).zero_()
            assert layer(x).isfinite().all()
            original(layer).copy_(weight)
            layer(x)
            assert norm_of(layer).sigma > 0.2
            original(layer).fill_(float("nan"))
            layer(x)
            original(layer).copy_(weight)
            assert layer(x).isfinite().all()


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
