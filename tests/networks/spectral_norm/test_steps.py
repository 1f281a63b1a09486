"""Steps of all layers together: their numbers are those of each layer alone, and they take few operations."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_uq.networks import spectral_normalize
from lightning_uq.networks.spectral_norm import power_iteration, together
from lightning_uq.networks.spectral_norm.steps import divide, find_steps
from lightning_uq.networks.spectral_norm.tensors import joined, unit, units
from tests.networks.spectral_norm.bounded import X, norm_of, original, small_net

# ------------------------------------------------------------------------------------------ how many operations

FREE = {  # views and allocations, which launch nothing
    *(
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
    ),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch: a few kernels for an operation on a list, one for most others."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def operations(net, x):
    """Those of one training step, the third."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)
    for _ in range(3):
        with Operations() as operations:
            optimizer.zero_grad()
            F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long)).backward()
            optimizer.step()
    return operations.count


def resnet():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=3)


def by_torch(net):
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            spectral_norm(layer)
    return net


@pytest.mark.parametrize("conv_norm", ["operator", "reshaped"])
def test_a_step_of_a_resnet_takes_few_operations(conv_norm):
    x = torch.randn(2, 3, 16, 16)
    bare, theirs = operations(resnet(), x), operations(by_torch(resnet()), x)
    ours = operations(spectral_normalize(resnet(), exclude=["fc"], conv_norm=conv_norm), x)
    layers, extra = 20, ours.total() - bare.total()
    assert extra <= 10 * layers
    assert extra < 0.5 * (theirs.total() - bare.total())
    # Nothing waits for a value, so that a CUDA graph can hold the step.
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & ours.keys()


def test_another_layer_takes_eight_operations():
    """Two products with u and v, the division and the buffers; four in the backward."""
    extra = []
    for depth in (10, 20):
        bare = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(depth)])
        bounded = spectral_normalize(copy.deepcopy(bare))
        x = torch.randn(2, 4)
        extra.append(operations(bounded, x).total() - operations(bare, x).total())
    assert extra[1] - extra[0] <= 8 * 10


# ------------------------------------------------------------------------------------------ the same numbers


def states(net, call, inputs):
    """Everything that training changes, after it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    grads = {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**net.state_dict(), **grads}


class Recurrent(nn.Module):
    """A layer that runs three times, one that runs at times, and one that another layer changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.often, self.seldom, self.changed = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for _ in range(3):
            x = self.often(x).tanh()
        if x.sum() > 0:
            x = self.seldom(x)
        with torch.no_grad():
            original(self.changed).mul_(1.01)
        return self.changed(x)


def sized():
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5))
    convolutions = (nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular", groups=2))
    return nn.Sequential(*convolutions, *head)


INPUTS = [torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(8)]
SIZES = [x.repeat(1, 1, *([1, 2][i // 2 % 2],) * 2) for i, x in enumerate(INPUTS)]
ROWS = [x.flatten()[:12].reshape(3, 4) for x in INPUTS]


@pytest.mark.parametrize(
    "arguments", [{}, {"n_power_iterations": 3}, {"conv_norm": "reshaped"}, {"eps": 1e-3}], ids=str
)
@pytest.mark.parametrize("coefficient", [0.3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [(small_net, INPUTS), (sized, SIZES), (Recurrent, ROWS)],
    ids=["plain", "sizes change", "layers run again, seldom, or with another weight"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_together_and_alone_give_the_same_numbers(make, inputs, coefficient, arguments):
    first = spectral_normalize(make().double(), coefficient=coefficient, **arguments)
    second = copy.deepcopy(first)
    together, alone = states(first, first, inputs), states(second, second.forward, inputs)  # without the hooks
    assert together.keys() == alone.keys()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12, msg=name)


def count_steps(monkeypatch):
    """How many layers each search for steps had."""
    searches = []
    for place in (together, power_iteration):
        monkeypatch.setattr(place, "find_steps", lambda norms, ws: searches.append(len(norms)) or find_steps(norms, ws))
    return searches


@pytest.mark.parametrize("how", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_layers_find_their_steps_together(how, monkeypatch):
    net = how(spectral_normalize(small_net()))
    net(X)
    searches = count_steps(monkeypatch)
    net(X)
    assert searches == [3]
    torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False).sum().backward()
    assert searches == [3] * 3
    net.eval()(X)
    assert searches == [3] * 3


def test_a_layer_that_does_not_run_keeps_its_vectors(monkeypatch):
    net = spectral_normalize(Recurrent())
    net.seldom.register_forward_pre_hook(lambda layer, args: ran.append(layer))
    x, ran = torch.ones(2, 4), []
    with torch.no_grad():
        original(net.often).fill_(1.0)
        net(x), net(x)
        assert len(ran) == 2
        kept = {name: value.clone() for name, value in norm_of(net.seldom).state_dict().items()}
        searches = count_steps(monkeypatch)
        net(-x), net(-x)
        assert len(ran) == 2
        assert searches.count(3) == 1  # the second forward does not ask it
        assert all(torch.equal(value, kept[name]) for name, value in norm_of(net.seldom).state_dict().items())
        searches.clear()
        net(x), net(x)
        assert searches.count(3) == 1  # until it has run again


def test_an_error_in_the_forward_leaves_no_step_behind():
    net = spectral_normalize(small_net())
    net(X)
    offered = []

    def interrupt(layer, args):
        offered.append(norm_of(net[5]).ready)
        raise ValueError("interrupted")

    net[3].register_forward_pre_hook(interrupt)
    with pytest.raises(ValueError, match="interrupted"):
        net(X)
    assert offered[0] is not None
    assert all(norm_of(net[i]).ready is None for i in (0, 3, 5))


# ------------------------------------------------------------------------------------------ gradients and units


@pytest.mark.parametrize("coefficient", [0.3, 100.0])
@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 4), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv1d(2, 4, 4, padding="same", groups=2)]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_gradients_of_every_order_are_those_of_autograd(layer, coefficient):
    layer = spectral_normalize(copy.deepcopy(layer).double(), coefficient=coefficient, eps=1e-3)
    sizes = {nn.Linear: (2, 3), nn.Conv2d: (1, 2, 6, 5), nn.Conv1d: (1, 2, 7)}
    layer(torch.ones(next(size for kind, size in sizes.items() if isinstance(layer, kind)), dtype=torch.float64))
    norm, weight = norm_of(layer), original(layer)
    step = find_steps([norm], [weight])[0]
    probe = torch.randn(weight.shape, dtype=torch.float64, requires_grad=True)
    found = []
    for bounded in (divide(norm, weight, step), norm.bounded_by(weight, step.u, step.v)):
        (plain,) = torch.autograd.grad(bounded, weight, probe, retain_graph=True)
        several = torch.autograd.grad(bounded, weight, torch.stack([probe, -2 * probe]), True, is_grads_batched=True)[0]
        (first,) = torch.autograd.grad(bounded, weight, probe, create_graph=True)
        second = torch.autograd.grad(first.square().sum() + bounded.sum(), (weight, probe))
        found.append([bounded, plain, several, first, *second])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_backward_under_autocast_is_precise():
    grads = []
    for enabled in (False, True):
        net = spectral_normalize(small_net(), coefficient=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            net(X)
            loss = sum((net[i].weight * net[i].weight.detach().roll(1)).sum() for i in (0, 3, 5))
            grads.append(torch.autograd.grad(loss, [original(net[i]) for i in (0, 3, 5)]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_units_of_many_are_those_of_each():
    bad = [torch.zeros(3), torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan, 1.0]), torch.full((2,), 3e38)]
    xs = [torch.randn(2, 3), *bad, 1e-13 * torch.ones(2), torch.randn(1)]
    otherwise = [torch.ones_like(x) for x in xs]
    torch.testing.assert_close(units(xs, otherwise), joined([unit(x, o) for x, o in zip(xs, otherwise, strict=True)]))
