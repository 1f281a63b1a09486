import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_uq.errors import InputError
from lightning_uq.networks import backbones
from lightning_uq.networks.backbones import VGG16, FCResNet, LeNet, ResNet, WideResNet, resnet18, resnet50, resnet110
from lightning_uq.networks.backbones.resnet import AvgPoolShortcut
from lightning_uq.networks.factory import Factory, factory_to_config
from lightning_uq.networks.spectral_norm import remove_spectral_norm, spectral_normalize

REFERENCE = Path(__file__).parents[1] / "reference"
COUNTS = json.loads((REFERENCE / "ddu_model_counts.json").read_text())
FAMILIES = {"resnet18": resnet18, "resnet50": resnet50, "resnet110": resnet110, "wrn": WideResNet, "vgg16": VGG16}
LAST = {"resnet18": "fc", "resnet50": "fc", "resnet110": "fc", "wrn": "linear", "vgg16": "classifier", "lenet": "fc3"}


def build(case):
    """The network of a reference case without its bounds, its name, and the size of its input."""
    name, *flags = case.split("_")
    if name == "lenet":
        return LeNet(), name, (1, 28, 28)
    arguments = {"modified": "mod1" in flags}
    if "mnist" in flags:
        arguments["in_channels"] = 1
        if name == "vgg16":
            arguments["input_size"] = 28
    return FAMILIES[name](**arguments), name, (1, 28, 28) if "mnist" in flags else (3, 32, 32)


def bounded(case):
    """The network of a reference case, its name, and the size of its input."""
    net, name, shape = build(case)
    if "sn1" in case.split("_"):
        spectral_normalize(net, coefficient=3.0, exclude=[LAST[name]])
    return net, name, shape


def is_bounded(layer):
    return parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("case", COUNTS)
def test_the_original_parameter_counts_are_met(case):
    expected = COUNTS[case]
    with torch.device("meta"):
        net, name, _ = bounded(case)
    assert sum(p.numel() for p in net.parameters()) == expected["params"]
    assert sum(is_bounded(layer) for layer in net.modules()) == expected["sn_layers"]
    last = getattr(net, LAST[name])
    assert type(last) is nn.Linear
    assert last.in_features == expected.get("feature_dim", last.in_features)


# The fastest of each family, and the two whose layers differ by the size of the input.
LOGITS = [
    "resnet18_sn0_mod0",
    "resnet18_sn0_mod1",
    "resnet18_sn1_mod0",
    "resnet18_mnist_sn1_mod1",
    "resnet50_sn0_mod1",
    "wrn_sn0_mod0",
    "wrn_sn1_mod1",
    "vgg16_sn0_mod1",
    "vgg16_mnist_sn1_mod0",
    "lenet_sn0_mod0",
]


@pytest.mark.parametrize("case", LOGITS)
def test_the_original_logits_are_met(case):
    expected = COUNTS[case]
    torch.manual_seed(0)
    net, name, shape = build(case)
    x = torch.linspace(-1, 1, int(np.prod(shape))).view(1, *shape)
    last = getattr(net, LAST[name])
    if "sn1" in case:
        # The original draws u and v right after each convolution's weight: draw as many here.
        norms = spectral_buffers(case, x)
        torch.manual_seed(0)
        for key, layer in net.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
                for size in norms.pop(key, ()):
                    torch.randn(size)
        assert not norms
        if name == "wrn":
            for layer in net.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(last.bias)
        # Before training the original's norms are those of random u and v, about 0.
        spectral_normalize(net, n_warmup_iterations=0, eps=1e-5, exclude=[LAST[name]])
    features = []
    last.register_forward_hook(lambda _, args, out: features.append(args[0]))
    with torch.no_grad():
        logits = net.eval()(x)
    assert features[0].shape == (1, expected["feature_dim"])
    torch.testing.assert_close(logits[0], torch.tensor(expected["logits_seed0_eval"]), rtol=1e-4, atol=2e-6)
    assert features[0].sum().item() == pytest.approx(expected["feature_sum"], rel=1e-4, abs=2e-5)


def spectral_buffers(case, x):
    """Sizes of the two vectors of each bounded layer, in the order in which the original draws them."""
    net, _, _ = bounded(case)
    for layer in net.modules():
        if is_bounded(layer):
            layer.parametrizations.weight[0].n_warmup_iterations = 0  # only the sizes are wanted
    with torch.no_grad():
        net.eval()(x)
    sizes, total = {}, 0
    for key, layer in net.named_modules():
        if is_bounded(layer):
            norm = layer.parametrizations.weight[0]
            u, v = norm.u.numel(), norm.v.numel()
            sizes[key] = (v, u) if norm.v.ndim > 1 else (u, v)
            total += u + v + norm.sigma.numel()
    assert total == COUNTS[case]["sn_buffers"]
    return sizes


def test_the_shortcut_is_the_original_one():
    reference = np.load(REFERENCE / "ddu_avgpool_shortcut.npz")
    for kind, stride in (("even", 2), ("odd", 2), ("s1", 1)):
        x, expected = (torch.from_numpy(reference[f"{part}_{kind}"]) for part in ("x", "out"))
        torch.testing.assert_close(AvgPoolShortcut(3, 5, stride)(x), expected, rtol=1e-6, atol=1e-6)


SMALL = {
    "lenet": (LeNet, "fc3", (1, 28, 28)),
    "resnet18": (lambda: resnet18(modified=True), "fc", (3, 16, 16)),
    "bottleneck": (lambda: ResNet("bottleneck", num_blocks=(1, 1, 1, 1)), "fc", (3, 16, 16)),
    "wide_resnet": (lambda: WideResNet(depth=10, widen_factor=1, modified=True), "linear", (3, 16, 16)),
    "vgg16": (VGG16, "classifier", (3, 32, 32)),
    "fc_resnet": (lambda: FCResNet(hidden_features=16, num_classes=10), "last", (2,)),
}


@pytest.mark.parametrize("with_bounds", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_a_network_trains_pickles_and_loads(family, with_bounds):
    plain, last, shape = SMALL[family]

    def make():
        return spectral_normalize(plain(), exclude=[last]) if with_bounds else plain()

    torch.manual_seed(0)
    net = make()
    x = torch.randn(4, *shape)
    loss = nn.functional.cross_entropy(net(x), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        expected = net(x)
        assert expected.shape == (4, 10)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), expected)
        other = make()
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other.eval()(x), expected)
        if with_bounds:
            torch.testing.assert_close(remove_spectral_norm(net)(x), expected)
            net.load_state_dict(plain().state_dict())  # the names of a plain network


@pytest.mark.parametrize("family", SMALL)
def test_bounds_exclude_the_last_layer_and_draw_no_random_number(family):
    make, last, _ = SMALL[family]
    torch.manual_seed(0)
    state = dict(make().named_parameters())
    torch.manual_seed(0)
    net = make()
    before = torch.get_rng_state()
    spectral_normalize(net, exclude=[last])
    assert torch.equal(torch.get_rng_state(), before)
    layers = [name for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert [name for name in layers if not is_bounded(net.get_submodule(name))] == [last]
    found = {k.replace("parametrizations.weight.original", "weight"): p for k, p in net.named_parameters()}
    assert set(found) == set(state)
    assert all(torch.equal(state[key], found[key]) for key in state)


def test_a_checkpoint_of_the_original_loads():
    """Its names: those of the modules, with ``weight_orig`` and its companions."""
    torch.manual_seed(0)
    net = spectral_normalize(WideResNet(depth=10, widen_factor=1), exclude=["linear"])
    net(torch.randn(2, 3, 32, 32))
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("parametrizations.weight.original", "weight_orig")
        key = key.replace("parametrizations.weight.0.", "weight_")
        state[key] = value.flatten() if key.endswith(("weight_u", "weight_v", "weight_sigma")) else value
    assert {"conv1.weight_orig", "layer2.0.shortcut.weight_u", "linear.weight"} < set(state)
    other = spectral_normalize(WideResNet(depth=10, widen_factor=1), exclude=["linear"])
    other.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), net.eval()(x))


def test_leaky_relu_is_the_modification_of_the_activation():
    for make in (resnet18, WideResNet, VGG16):
        for modified, kind in ((False, nn.ReLU), (True, nn.LeakyReLU)):
            with torch.device("meta"):
                net = make(modified=modified)
            kinds = {type(layer) for layer in net.modules() if isinstance(layer, (nn.ReLU, nn.LeakyReLU))}
            assert kinds == {kind}


def test_every_backbone_is_an_importable_factory():
    for name in backbones.__all__:
        if name != "ResNet":
            factory = Factory(f"lightning_uq.networks.backbones.{name}", {"num_classes": 3})
            with torch.device("meta"):
                assert isinstance(factory(), nn.Module)
            assert factory_to_config(getattr(backbones, name)) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResNet("wide", num_blocks=(1, 1, 1, 1)),
            "`block` must be one of ['basic', 'bottleneck'], but it is 'wide'.",
        ),
        (
            lambda: ResNet("basic", num_blocks=(1, 1)),
            "`num_blocks` must be four numbers of at least 1, but it is [1, 1].",
        ),
        (lambda: WideResNet(depth=20), "`depth` must be 6 n + 4 with n of at least 1, but it is 20."),
        (lambda: WideResNet(depth=4), "`depth` must be 6 n + 4 with n of at least 1, but it is 4."),
        (lambda: LeNet(input_size=15), "`input_size` must be an integer of at least 16, but it is 15."),
        (lambda: VGG16(input_size=64), "`input_size` must be 28 or 32, but it is 64."),
        (
            lambda: FCResNet(activation="gelu"),
            "`activation` must be one of ['relu', 'elu'], but it is 'gelu'.",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(InputError) as info:
        make()
    assert str(info.value) == message
