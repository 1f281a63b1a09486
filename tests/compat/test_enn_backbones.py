"""ENN's backbones held to a second forward pass, in numpy, from arrays named as Haiku names them."""

import copy
import functools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_uq.callbacks import FitGMM
from lightning_uq.compat.haiku import ENNVGG, ENNLeNet, ENNResNetV1, ENNResNetV2, load_haiku
from lightning_uq.compat.haiku.batch_norm import DebiasedBatchNorm2d
from lightning_uq.compat.haiku.resnet import ENNBlockV1, ENNBlockV2
from lightning_uq.errors import InputError
from lightning_uq.modules import EpinetModule
from lightning_uq.networks import EnsembleNetwork, VmapEnsembleNetwork
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.features import last_layer, traced_last_layer

CLASSES = 5
VGG_CHANNELS = (64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)

# ------------------------------------------------------------------ the arrays, by the names and shapes that Haiku gives


class Arrays(dict):
    """Random parameters and state; ``counter`` batches of averages were seen."""

    def __init__(self, seed: int = 0, counter: int = 3) -> None:
        super().__init__()
        self.rng, self.counter = np.random.default_rng(seed), counter

    def conv(self, name, size, a, b, bias=False):
        self[f"{name}/w"] = self.rng.normal(size=(size, size, a, b)).astype("f4") / np.float32(size * a**0.5)
        if bias:
            self[f"{name}/b"] = self.rng.normal(size=b).astype("f4")

    def linear(self, name, a, b):
        self[f"{name}/w"] = self.rng.normal(size=(a, b)).astype("f4") / np.float32(a**0.5)
        self[f"{name}/b"] = self.rng.normal(size=b).astype("f4")

    def norm(self, name, c, decay=0.9, scale=True):
        shape = (1, 1, 1, c)
        if scale:
            self[f"{name}/scale"] = self.rng.normal(1, 0.2, shape).astype("f4")
        self[f"{name}/offset"] = self.rng.normal(0, 0.2, shape).astype("f4")
        for which, average in (("mean", self.rng.normal(0, 0.2, shape)), ("var", self.rng.uniform(0.5, 2, shape))):
            self[f"{name}/~/{which}_ema/average"] = average.astype("f4")
            self[f"{name}/~/{which}_ema/hidden"] = (average * (1 - decay**self.counter)).astype("f4")
            self[f"{name}/~/{which}_ema/counter"] = np.array(self.counter, "i4")


def lenet_arrays(channels=1, size=28):
    arrays = Arrays()
    for i, (a, b) in enumerate(((channels, 6), (6, 16), (16, 120))):
        arrays.conv(f"le_net5/~/conv_2d_{i}", 5, a, b, bias=True)
        size = (size + 1) // 2
    arrays.linear("le_net5/~/linear", size * size * 120, 84)
    arrays.linear("le_net5/~/logits", 84, CLASSES)
    return arrays


def vgg_arrays():
    arrays = Arrays()
    for i, (a, b) in enumerate(zip((3, *VGG_CHANNELS), VGG_CHANNELS, strict=False)):
        arrays.conv(f"vgg/~/conv_2d_{i}", 3, a, b, bias=True)
        arrays.norm(f"vgg/~/batchnorm_{i}", b, decay=0.999, scale=False)
    arrays.linear("vgg/~/logits", 512, CLASSES)
    return arrays


def numbered(name, i):
    return f"{name}_{i}" if i else name


def v1_arrays(blocks=2, seed=0, channels=3):
    arrays = Arrays(seed)
    arrays.conv("res_net/~/initial_conv", 3, channels, 16)
    arrays.norm("res_net/~/initial_batchnorm", 16)
    width = 16
    for i, c in enumerate(np.repeat((16, 32, 64), blocks).tolist()):
        name = f"res_net/~/{numbered('res_block_v1', i)}/~"
        arrays.conv(f"{name}/conv0", 3, width, c)
        arrays.norm(f"{name}/batchnorm_0", c)
        arrays.conv(f"{name}/conv1", 3, c, c)
        arrays.norm(f"{name}/batchnorm_1", c)
        width = c
    arrays.linear("res_net/~/final_fc", 64, CLASSES)
    return arrays


V2 = {
    "enn": {
        "block": lambda number, group, i: numbered("res_block_v2", number),
        "conv": "conv",
        "shortcut": "conv_shortcut",
        "last": "final_fc",
        "root": "res_net",
    },
    "haiku": {
        "block": lambda number, group, i: f"block_group_{group}/~/block_{i}",
        "conv": "conv_",
        "shortcut": "shortcut_conv",
        "last": "logits",
        "root": "res_net50",
    },
}


@functools.cache
def v2_arrays(spelling, blocks=(3, 4, 6, 3)):
    names = V2[spelling]
    arrays, root = Arrays(), names["root"]
    arrays.conv(f"{root}/~/initial_conv", 7, 3, 64)
    width, number = 64, 0
    for group, count in enumerate(blocks):
        c = 256 * 2**group
        for i in range(count):
            name = f"{root}/~/{names['block'](number, group, i)}/~"
            for k, (size, a, b) in enumerate(((1, width, c // 4), (3, c // 4, c // 4), (1, c // 4, c))):
                arrays.norm(f"{name}/batchnorm_{k}", a)
                arrays.conv(f"{name}/{names['conv']}{k}", size, a, b)
            if i == 0:
                arrays.conv(f"{name}/{names['shortcut']}", 1, width, c)
            width, number = c, number + 1
    arrays.norm(f"{root}/~/final_batchnorm", width)
    arrays.linear(f"{root}/~/{names['last']}", width, CLASSES)
    return arrays


# ------------------------------------------------------------------------------- the forward pass in numpy, [B, H, W, C]


def windows(x, size, stride, value):
    """[B, H', W', C, size, size]: TensorFlow's SAME windows."""
    pads = [(0, 0)]
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [*pads, (0, 0)], constant_values=value)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def conv(p, name, x, stride=1):
    w = p[f"{name}/w"].astype("f8")
    return np.einsum("bhwcij,ijco->bhwo", windows(x, w.shape[0], stride, 0.0), w, optimize=True) + p.get(f"{name}/b", 0)


def max_pool(x, size):
    return windows(x, size, 2, -np.inf).max((-2, -1))


def norm(p, name, x):
    mean, variance = (p[f"{name}/~/{which}_ema/average"].astype("f8") for which in ("mean", "var"))
    return (x - mean) / np.sqrt(variance + 1e-5) * p.get(f"{name}/scale", 1.0) + p[f"{name}/offset"]


def linear(p, name, x):
    return x @ p[f"{name}/w"].astype("f8") + p[f"{name}/b"]


def relu(x):
    return np.maximum(x, 0)


def lenet(p, x):
    for i in range(3):
        x = max_pool(relu(conv(p, f"le_net5/~/conv_2d_{i}", x)), 2)
    return linear(p, "le_net5/~/logits", relu(linear(p, "le_net5/~/linear", x.reshape(len(x), -1))))


def vgg(p, x):
    for i, stride in enumerate((1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1)):
        x = relu(norm(p, f"vgg/~/batchnorm_{i}", conv(p, f"vgg/~/conv_2d_{i}", x, stride)))
    return linear(p, "vgg/~/logits", x.mean((1, 2)))


def v1(p, x, blocks=2):
    x = relu(norm(p, "res_net/~/initial_batchnorm", conv(p, "res_net/~/initial_conv", x)))
    for i in range(3 * blocks):
        name, stride = f"res_net/~/{numbered('res_block_v1', i)}/~", 2 if i in (blocks, 2 * blocks) else 1
        branch = relu(norm(p, f"{name}/batchnorm_0", conv(p, f"{name}/conv0", x, stride)))
        branch = norm(p, f"{name}/batchnorm_1", conv(p, f"{name}/conv1", branch))
        if stride == 2:  # half as many channels of zeros before those of the input, and as many behind
            zeros = np.zeros_like(x[:, ::2, ::2, : x.shape[3] // 2])
            x = np.concatenate([zeros, x[:, ::2, ::2], zeros], axis=3)
        x = relu(branch + x)
    return linear(p, "res_net/~/final_fc", x.mean((1, 2)))


def v2(p, x, names, blocks=(3, 4, 6, 3)):
    root, number = names["root"], 0
    x = max_pool(conv(p, f"{root}/~/initial_conv", x, 2), 3)
    for group, count in enumerate(blocks):
        for i in range(count):
            name, stride = f"{root}/~/{names['block'](number, group, i)}/~", 2 if group and not i else 1
            normal = relu(norm(p, f"{name}/batchnorm_0", x))
            branch = conv(p, f"{name}/{names['conv']}0", normal)
            branch = conv(p, f"{name}/{names['conv']}1", relu(norm(p, f"{name}/batchnorm_1", branch)), stride)
            branch = conv(p, f"{name}/{names['conv']}2", relu(norm(p, f"{name}/batchnorm_2", branch)))
            x = branch + (conv(p, f"{name}/{names['shortcut']}", normal, stride) if i == 0 else x)
            number += 1
    x = relu(norm(p, f"{root}/~/final_batchnorm", x))
    return linear(p, f"{root}/~/{names['last']}", x.mean((1, 2)))


def images(channels, height, width=None, number=2):
    return torch.randn(number, channels, height, width or height, generator=torch.Generator().manual_seed(1))


CASES = {
    "lenet 28": (lambda: ENNLeNet(CLASSES), lenet_arrays, lenet, images(1, 28)),
    "lenet 9, three channels": (lambda: ENNLeNet(CLASSES, 3, 9), lambda: lenet_arrays(3, 9), lenet, images(3, 9)),
    "vgg 8": (lambda: ENNVGG(CLASSES), vgg_arrays, vgg, images(3, 8)),
    "vgg 7x10": (lambda: ENNVGG(CLASSES), vgg_arrays, vgg, images(3, 7, 10)),
    "resnet18 16": (lambda: ENNResNetV1(CLASSES), v1_arrays, v1, images(3, 16)),
    "resnet18 9x6, one channel": (lambda: ENNResNetV1(CLASSES, 1), lambda: v1_arrays(channels=1), v1, images(1, 9, 6)),
    "resnet32 8": (
        lambda: ENNResNetV1(CLASSES, depth=32),
        lambda: v1_arrays(5),
        lambda p, x: v1(p, x, 5),
        images(3, 8),
    ),
    "resnet50 33x40": (
        lambda: ENNResNetV2(CLASSES),
        lambda: v2_arrays("enn"),
        lambda p, x: v2(p, x, V2["enn"]),
        images(3, 33, 40, number=1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_haikus_arrays_give_the_logits_of_a_second_forward_pass(case):
    make, make_arrays, forward, x = CASES[case]
    arrays = make_arrays()
    network = load_haiku(make(), arrays).eval()
    with torch.no_grad():
        logits = network.double()(x.double())
    expected = torch.from_numpy(forward(arrays, x.double().permute(0, 2, 3, 1).numpy()))
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_every_array_reaches_the_output():
    arrays, x = v1_arrays(), images(3, 8)
    network = load_haiku(ENNResNetV1(CLASSES), arrays).eval()
    with torch.no_grad():
        expected = network(x)
        for name in arrays:
            if not name.endswith(("counter", "hidden")):
                changed = load_haiku(copy.deepcopy(network), {**arrays, name: arrays[name] + 0.5})
                assert not torch.allclose(changed(x), expected), name


# ------------------------------------------------------------------------------------------------- sizes and first values

V1_COUNT = {18: 172_506, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", V1_COUNT)
def test_v1_has_as_many_parameters_as_its_layers_say(depth):
    blocks = {18: 2, 32: 5, 44: 7, 56: 9, 110: 18}[depth]
    count = 9 * 3 * 16 + 2 * 16 + 64 * 10 + 10
    for a, b in ((16, 16), (16, 32), (32, 64)):
        count += 9 * a * b + 9 * b * b + 4 * b + (blocks - 1) * (18 * b * b + 4 * b)
    with torch.device("meta"):
        network = ENNResNetV1(depth=depth)
    assert sum(p.numel() for p in network.parameters()) == count == V1_COUNT[depth]
    # He et al. count 0.46 M, 0.66 M, 0.85 M and 1.7 M.
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 6 * blocks + 1


@pytest.mark.parametrize("depth", [50, 101, 152, 200])
def test_v2_has_as_many_parameters_as_its_layers_say(depth):
    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}[depth]
    arrays_count, width = 49 * 3 * 64, 64
    for group, number in enumerate(blocks):
        c = 256 * 2**group
        for i in range(number):
            w = c // 4
            arrays_count += 2 * (width + 2 * w) + width * w + 9 * w * w + w * c + (width * c if not i else 0)
            width = c
    with torch.device("meta"):
        network = ENNResNetV2(depth=depth)
    assert sum(p.numel() for p in network.parameters()) == arrays_count + 2 * width + width * 1000 + 1000
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 3 * sum(blocks) + 1 + 4


def test_lenet_and_vgg_have_as_many_parameters_as_their_layers_say():
    lenet_count = 26 * 6 + (25 * 6 + 1) * 16 + (25 * 16 + 1) * 120 + (16 * 120 + 1) * 84 + 85 * 10
    assert sum(p.numel() for p in ENNLeNet().parameters()) == lenet_count == 212_906
    vgg_count = sum(9 * a * b + 2 * b for a, b in zip((3, *VGG_CHANNELS), VGG_CHANNELS, strict=False)) + 513 * 10
    assert sum(p.numel() for p in ENNVGG().parameters()) == vgg_count == 7_790_794
    kinds = Counter(type(m) for m in ENNVGG().modules())
    assert kinds[DebiasedBatchNorm2d] == 11


def test_a_resnets_first_output_is_zero_and_its_body_learns_from_the_second_step():
    network, x, y = ENNResNetV1(CLASSES), images(3, 8, number=6), torch.arange(6) % CLASSES
    assert not network(x).any()
    F.cross_entropy(network(x), y).backward()
    for name, parameter in network.named_parameters():
        assert bool(parameter.grad.any()) == name.startswith("final_fc"), name
    with torch.no_grad():
        network.final_fc.weight -= 0.1 * network.final_fc.weight.grad
    F.cross_entropy(network(x), y).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("network", [ENNLeNet(CLASSES, 3, 8), ENNVGG(CLASSES)], ids=["lenet", "vgg"])
def test_the_others_are_drawn_as_haiku_draws_all_their_layers(network):
    x = images(3, 8, number=6)
    assert network(x).std() > 0.01
    F.cross_entropy(network(x), torch.arange(6) % CLASSES).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad.any() for name, p in network.named_parameters() if name.endswith("weight"))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() <= 2 * std
            assert not layer.bias.any()
            if layer.weight.numel() > 20_000:
                assert layer.weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)


# ------------------------------------------------------------------------------------------------------- Haiku's averages


def haiku_batch_norm(x, state, decay):
    """One training step of ``hk.BatchNorm``, in float64: output, and new (hidden mean, hidden variance, counter)."""
    hidden_mean, hidden_variance, counter = state
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    state = (hidden_mean * decay + mean * (1 - decay), hidden_variance * decay + variance * (1 - decay), counter + 1)
    out = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return out, state


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_averages_are_those_of_haiku_batch_after_batch(decay):
    ours = DebiasedBatchNorm2d(3, decay, scale=False).double()
    state = (torch.zeros(3).double(), torch.zeros(3).double(), 0)
    for step in range(1, 8):
        x = torch.randn(4, 3, 2, 2).double() * step + 3
        expected, state = haiku_batch_norm(x, state, decay)
        torch.testing.assert_close(ours(x), expected)
        assert ours.num_batches_tracked == state[2] == step
        torch.testing.assert_close(ours.running_mean, state[0] / (1 - decay**step))
        torch.testing.assert_close(ours.running_var, state[1] / (1 - decay**step))
    mean, variance = (s / (1 - decay**7) for s in state[:2])
    x = torch.randn(1, 3, 1, 1).double()
    expected = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(ours.eval()(x), expected)


def test_training_goes_on_from_a_loaded_state():
    arrays = v1_arrays()
    network = load_haiku(ENNResNetV1(CLASSES), arrays).double()
    inputs = []
    network.initial_bn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(images(3, 8).double())
    name = "res_net/~/initial_batchnorm/~/{}_ema/hidden"
    hidden = [torch.from_numpy(arrays[name.format(which)]).double().flatten() for which in ("mean", "var")]
    _, (mean, variance, counter) = haiku_batch_norm(inputs[0].detach(), (*hidden, 3), 0.9)
    assert network.initial_bn.num_batches_tracked == counter
    torch.testing.assert_close(network.initial_bn.running_mean, mean / (1 - 0.9**4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.initial_bn.running_var, variance / (1 - 0.9**4), rtol=1e-6, atol=1e-6)


def test_a_momentum_of_none_is_the_plain_mean():
    """What stochastic weight averaging sets to estimate the statistics anew."""
    ours = DebiasedBatchNorm2d(2)
    batches = [torch.randn(5, 2, 3, 3) + i for i in range(4)]
    ours(100 * batches[0])
    torch.optim.swa_utils.update_bn(batches, ours)
    assert ours.momentum == pytest.approx(0.1)
    torch.testing.assert_close(ours.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    variances = [b.var((0, 2, 3), correction=0) for b in batches]
    torch.testing.assert_close(ours.running_var, torch.stack(variances).mean(0))


def test_the_gradient_is_that_of_batch_norm():
    ours, torchs = DebiasedBatchNorm2d(2).double(), nn.BatchNorm2d(2).double()
    x = torch.randn(5, 2, 3, 3).double().requires_grad_()
    weights = torch.randn(5, 2, 3, 3).double()
    gradients = [torch.autograd.grad((norm(x) * weights).sum(), [x, *norm.parameters()]) for norm in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(DebiasedBatchNorm2d(2, scale=False).double(), x)


def test_a_norm_is_reset_converted_and_kept_where_it_is_not_trained():
    norm = DebiasedBatchNorm2d(2, scale=False)
    with torch.no_grad():
        norm.bias.fill_(3.0)
    norm(torch.randn(5, 2, 3, 3))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm)).eval()
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(synced(x), norm.eval()(x))
    state = copy.deepcopy(norm.state_dict())
    assert set(state) == {"bias", "running_mean", "running_var", "num_batches_tracked"}
    norm(x)
    torch.testing.assert_close(norm.state_dict(), state)
    norm.reset_parameters()
    assert norm.num_batches_tracked == 0
    assert not norm.bias.any()
    assert DebiasedBatchNorm2d(2).weight.tolist() == [1.0, 1.0]


# ----------------------------------------------------------------------------------------------------- names that do not fit


def test_the_name_before_the_layers_is_free_and_mappings_may_be_nested():
    arrays = v1_arrays()
    plain = load_haiku(ENNResNetV1(CLASSES), arrays)
    renamed = {f"agent/base/{name.removeprefix('res_net/')}": value for name, value in arrays.items()}
    nested = {}
    for name, value in arrays.items():
        module, _, leaf = name.rpartition("/")
        nested.setdefault(module, {})[leaf] = torch.from_numpy(value)
    flat = {name: value.flatten() if value.shape[:3] == (1, 1, 1) else value for name, value in arrays.items()}
    for params in (renamed, nested, flat):
        other = load_haiku(ENNResNetV1(CLASSES), params)
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def without(arrays, *ends):
    return {name: value for name, value in arrays.items() if not name.endswith(ends)}


BAD = {
    "missing": (
        lambda p: without(p, "res_block_v1_3/~/conv1/w"),
        "`params` must hold 'res_net/res_block_v1_3/conv1/w' for ENNResNetV1, but it does not.",
    ),
    "no state": (
        lambda p: without(p, "average", "hidden", "counter"),
        "`params` must hold 'res_net/initial_batchnorm/mean_ema/average' for ENNResNetV1, but it does not, "
        "nor 38 more. The averages are in the state of Haiku: pass {**params, **state}.",
    ),
    "no counter": (
        lambda p: without(p, "res_block_v1/~/batchnorm_0/~/mean_ema/counter"),
        "`params` must hold 'res_net/res_block_v1/batchnorm_0/mean_ema/counter' for ENNResNetV1, but it does "
        "not. The averages are in the state of Haiku: pass {**params, **state}.",
    ),
    "unused": (
        lambda p: {**p, "res_net/~/res_block_v1_6/~/conv0/w": np.zeros(1), "other/b": np.zeros(1)},
        "`params` must hold only the arrays of ENNResNetV1, but it also holds 'res_net/~/res_block_v1_6/~/conv0/w' "
        "and 1 more.",
    ),
    "shape": (
        lambda p: {**p, "res_net/~/res_block_v1_2/~/conv0/w": np.zeros((3, 3, 32, 16))},
        "'res_net/~/res_block_v1_2/~/conv0/w' must match the weight [32, 16, 3, 3] of a SameConv2d, but its shape is "
        "[16, 32, 3, 3] after its axes are moved.",
    ),
    "scale": (
        lambda p: {**p, "res_net/~/initial_batchnorm/scale": np.zeros((1, 1, 1, 3))},
        "'res_net/~/initial_batchnorm/scale' must match the weight [16] of a DebiasedBatchNorm2d, but its shape is [3] after "
        "its axes are moved.",
    ),
    "classes": (
        lambda p: {**p, "res_net/~/final_fc/w": np.zeros((64, 7)), "res_net/~/final_fc/b": np.zeros(7)},
        "'res_net/~/final_fc/w' must match the weight [5, 64] of a Linear, but its shape is [7, 64] after its axes are moved.",
    ),
    "empty": (
        lambda p: {},
        "`params` must hold 'initial_conv/w', the first layer of ENNResNetV1, once, but it occurs 0 times "
        "among 0 arrays.",
    ),
    "another network": (
        lambda p: lenet_arrays(),
        "`params` must hold 'initial_conv/w', the first layer of ENNResNetV1, once, but it occurs 0 times "
        "among 10 arrays: 'le_net5/~/conv_2d_0/w', 'le_net5/~/conv_2d_0/b', 'le_net5/~/conv_2d_1/w', "
        "'le_net5/~/conv_2d_1/b', ....",
    ),
    "two networks": (
        lambda p: {"a/initial_conv/w": np.zeros(1), "b/initial_conv/w": np.zeros(1)},
        "`params` must hold 'initial_conv/w', the first layer of ENNResNetV1, once, but it occurs 2 times "
        "among 2 arrays: 'a/initial_conv/w', 'b/initial_conv/w'.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    change, message = BAD[case]
    with pytest.raises(InputError) as info:
        load_haiku(ENNResNetV1(CLASSES), change(v1_arrays()))
    assert str(info.value) == message


def test_v2_goes_by_the_names_of_enn_and_by_those_of_haikus_own_network():
    enn, haiku = ENNResNetV2(CLASSES), ENNResNetV2(CLASSES)
    load_haiku(enn, v2_arrays("enn"))
    load_haiku(haiku, v2_arrays("haiku"))
    assert "res_net50/~/block_group_2/~/block_5/~/conv_2/w" in v2_arrays("haiku")
    state = haiku.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in enn.state_dict().items())
    for spelling, missing, told in (
        ("enn", "res_net/~/res_block_v2_15/~/conv2/w", "res_net/res_block_v2_15/conv2/w"),
        ("haiku", "res_net50/~/logits/b", "res_net50/logits/b"),
    ):
        arrays = dict(v2_arrays(spelling))
        del arrays[missing]
        with pytest.raises(InputError, match=f"must hold '{told}' for ENNResNetV2"):
            load_haiku(haiku, arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ENNResNetV1(depth=50),
            "`depth` must be one of [18, 32, 44, 56, 110], but it is 50.",
        ),
        (lambda: ENNResNetV2(depth=18), "`depth` must be one of [50, 101, 152, 200], but it is 18."),
        (lambda: ENNLeNet(input_size=0), "`input_size` must be an integer of at least 1, but it is 0."),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(InputError) as info:
        make()
    assert str(info.value) == message


# ------------------------------------------------------------------------------------------------- in the rest of the package

SMALL = {
    "lenet": (lambda: ENNLeNet(CLASSES, 3, 8), "logits", 84),
    "vgg": (lambda: ENNVGG(CLASSES), "logits", 512),
    "resnet18": (lambda: ENNResNetV1(CLASSES), "final_fc", 64),
    "resnet50": (lambda: ENNResNetV2(CLASSES), "final_fc", 2048),
}


@pytest.mark.parametrize("family", SMALL)
def test_the_features_are_the_input_of_the_last_layer(family):
    make, name, width = SMALL[family]
    network, x = make(), images(3, 8)
    before = copy.deepcopy(network.state_dict())
    assert traced_last_layer(network) == (name, CLASSES)
    torch.testing.assert_close(network.state_dict(), before)  # tracing moves no average
    assert last_layer(network.eval(), lambda: network(x)) == name
    assert bool(network(x).any()) == (name != "final_fc")
    assert network.get_submodule(name).in_features == width


def test_a_density_reads_the_pooled_features():
    network, x, y = ENNResNetV1(2), images(3, 8, number=200), torch.arange(200) % 2
    network(x)
    network.eval()
    features = []
    hook = network.blocks.register_forward_hook(lambda _, args, out: features.append(out.mean((2, 3))))
    with torch.no_grad():
        network(x)
    hook.remove()
    assert features[0].shape == (200, 64)
    streamed, direct = (FitGMM(feature_transform="raw") for _ in range(2))
    streamed.fit(network, [(x, y)])
    direct.fit_features(features[0], y)
    torch.testing.assert_close(streamed.score(network, [x]), -direct.log_density(features[0]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["lenet", "vgg", "resnet18"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_frozen_backbone_carries_an_epinet(family, precision, make_trainer):
    make, _, width = SMALL[family]
    base = make()
    before = copy.deepcopy(base.state_dict())
    module = EpinetModule(base, freeze_base=True, num_eval_samples=4)
    assert module.network.epinet is not None  # built from the structure, before any batch
    assert module.network.epinet.scaler.running_mean.shape == (width,)
    x, y = images(3, 8, number=16), torch.arange(16) % CLASSES
    trainer = make_trainer(precision=precision, max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(list(zip(x, y.tolist(), strict=True)), batch_size=8))
    torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)
    logits = module.eval()(x)
    assert logits.shape == (4, 16, CLASSES)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_an_epinet_on_loaded_weights():
    arrays, x = v1_arrays(), images(3, 8)
    module = EpinetModule(ENNResNetV1(CLASSES), freeze_base=True, head=EpinetHead(prior_scale=0.0))
    load_haiku(module.network.base, arrays)
    features = []
    module.network.base.final_fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        module.eval()(x)
        expected = torch.from_numpy(v1(arrays, x.double().permute(0, 2, 3, 1).numpy())).float()
        torch.testing.assert_close(module.network.base(x), expected, rtol=1e-4, atol=1e-5)
    assert features[0].shape == (2, 64)


@pytest.mark.parametrize("network_class", [EnsembleNetwork, VmapEnsembleNetwork])
def test_an_ensemble_of_haiku_loads_and_trains_member_by_member(network_class):
    several = [v1_arrays(seed=seed) for seed in range(2)]
    stacked = {name: np.stack([arrays[name] for arrays in several]) for name in several[0]}
    members = [ENNResNetV1(CLASSES) for _ in several]
    load_haiku(EnsembleNetwork(members), stacked)
    ensemble, x = network_class(members), images(3, 8)
    alone = [load_haiku(ENNResNetV1(CLASSES), arrays) for arrays in several]
    for mode in (True, False):
        ensemble.train(mode)
        expected = torch.stack([member.train(mode)(x) for member in alone])
        torch.testing.assert_close(ensemble(x), expected, rtol=1e-4, atol=1e-5)
    state = ensemble.state_dict()
    counted = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counted
    assert all((value == 4).all() for value in counted)
    assert not torch.allclose(expected[0], expected[1])


def blocks():
    """A block of each kind."""
    return nn.Sequential(ENNBlockV1(3, 9, 2), ENNBlockV2(9, 16, 2, projects=True))


@pytest.mark.parametrize("make", [SMALL["lenet"][0], blocks], ids=["lenet", "blocks"])
def test_compiling_changes_nothing(make):
    network, x = make(), images(3, 8, number=4)
    other = copy.deepcopy(network)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        network.train(mode)
        compiled.train(mode)
        expected, got = network(x), compiled(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if mode:
            expected.square().mean().backward()
            got.square().mean().backward()
    torch.testing.assert_close(other.state_dict(), network.state_dict(), rtol=1e-4, atol=1e-5)
    for a, b in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["lenet", "vgg", "resnet18", "blocks"])
def test_half_precision(family):
    network, x = {**SMALL, "blocks": (blocks,)}[family][0](), images(3, 16 if family != "lenet" else 8, number=32)
    if family == "resnet18":
        nn.init.normal_(network.final_fc.weight)
    network(x)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network(x)
        half = network.bfloat16()(x.bfloat16())
    for output in (mixed, half):
        assert output.dtype == torch.bfloat16
        assert (output - expected).abs().mean() < 0.05 * expected.std()
    network.train()(x.bfloat16()).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("family", ["lenet", "vgg", "resnet18"])
def test_it_pickles_exports_and_is_an_importable_factory(family):
    network, x = SMALL[family][0](), images(3, 8)
    network(x)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(network))(x), expected)
        torch.testing.assert_close(torch.export.export(network, (x,), strict=False).module()(x), expected)
    arguments = {"num_classes": CLASSES} | ({"in_channels": 3, "input_size": 8} if family == "lenet" else {})
    other = Factory(f"lightning_uq.compat.haiku.{type(network).__name__}", arguments)()
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other.eval()(x), expected)
