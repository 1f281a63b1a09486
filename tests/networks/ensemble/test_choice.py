"""What cannot run at once is named, and ``auto`` then takes the loop."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import parametrizations

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks import MLP, EnsembleNetwork, NetworkWithPrior, StackedEnsembleNetwork, build_ensemble
from lightning_uq.networks.ensemble.operations import linear


class Custom(nn.Module):
    """A linear layer and whatever ``then(self, x)`` does with its output."""

    def __init__(self, then, **attributes):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.then = then
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.then(self, self.layer(x))


def tied():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    return network


def hooked():
    network = nn.Linear(4, 4)
    network.register_forward_hook(lambda module, args, output: output * 2)
    return network


def half_frozen():
    network = MLP(4, 4, hidden_sizes=(4,), norm="batch")
    network[1].eval()
    return network


def named_state():
    network = nn.Linear(4, 4)
    network._register_state_dict_hook(lambda *args: None)
    return network


class Extra(nn.Linear):
    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        pass


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


PLAIN = {
    "convolution": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 2, 3)), r"'1' \(Conv1d\) has no counterpart over stacked"),
    "bare convolution": (lambda: nn.Conv1d(4, 2, 3), r": Conv1d has no counterpart over stacked"),
    "dropout of channels": (lambda: Custom(lambda s, x: s.drop(x), drop=nn.Dropout1d()), r"'drop' \(Dropout1d\) has no counterpart over stacked members"),
    "matmul": (lambda: Custom(lambda s, x: x @ x.mT), "the attribute 'mT' of a tensor"),
    "unknown function": (lambda: Custom(lambda s, x: torch.cumsum(x, 1)), "the function cumsum has no counterpart"),
    "unknown method": (lambda: Custom(lambda s, x: x.cumsum(1)), "the method cumsum has no counterpart"),
    "in-place method": (lambda: Custom(lambda s, x: x.relu_()), "the method relu_ has no counterpart"),
    "in-place module": (lambda: Custom(lambda s, x: x + s.act(x)), "an in-place operation on a tensor that is used again"),
    "in-place function": (lambda: Custom(lambda s, x: F.relu(x, inplace=True) + x), "an in-place operation on a tensor"),
    "whole sum": (lambda: Custom(lambda s, x: x - x.sum()), "sum without a fixed `dim`"),
    "whole squeeze": (lambda: Custom(lambda s, x: x.squeeze()), "squeeze without a fixed `dim`"),
    "axis by numpy's name": (lambda: Custom(lambda s, x: torch.cat([x, x], axis=1)), "cat with `axis` instead of `dim`"),
    "softmax without axis": (lambda: Custom(lambda s, x: s.soft(x), soft=nn.Softmax()), r"'soft' \(Softmax\)"),
    "index by tensor": (lambda: Custom(lambda s, x: x[:, torch.tensor([1, 0])]), "a tensor that is neither a parameter nor a buffer"),
    "constant tensor": (lambda: Custom(lambda s, x: x + torch.ones(4)), "a tensor that is neither a parameter nor a buffer"),
    "noise": (lambda: Custom(lambda s, x: x + torch.randn_like(x)), "the function randn_like has no counterpart"),
    "keyword tensor": (lambda: Custom(lambda s, x: torch.add(x, other=x)), "add with a tensor as a keyword argument"),
    "slice of a tuple": (lambda: Custom(lambda s, x: x.chunk(2, 1)[:1][0]), "a slice of a tuple of tensors"),
    "tuple output": (lambda: Custom(lambda s, x: x.chunk(2, 1)), "the members return several tensors or a size, not one tensor"),
    "size output": (lambda: Custom(lambda s, x: x.size(0)), "the members return several tensors or a size, not one"),
    "list output": (lambda: Custom(lambda s, x: [x, x]), "the members return a list, not one tensor"),
    "dict output": (lambda: Custom(lambda s, x: {"logits": x}), "the members return a dict, not one tensor"),
    "view as another type": (lambda: Custom(lambda s, x: x.view(torch.int32)), "the method view has no counterpart"),
    "value-dependent": (lambda: Custom(lambda s, x: x if x.sum() > 0 else -x), r"forward pass of Custom cannot be traced \(TraceError"),
    "extra state": (lambda: Extra(4, 4), "the state dict of Extra has entries other than its parameters and buffers"),
    "two arguments": (lambda: Custom(lambda s, x: s.layer(input=x)), r"a call of 'layer' \(Linear\) with more than one tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_stacked_is_named(name):
    make, text = PLAIN[name]
    with pytest.raises(UnsupportedError, match=text) as error:
        build_ensemble([make() for _ in range(2)], "stacked")
    assert str(error.value).startswith("execution='stacked' does not support these members: ")
    assert str(error.value).endswith(". Use execution='loop' or 'auto'.")
    chosen = build_ensemble([make() for _ in range(2)])
    assert chosen.execution == "loop"
    assert "runs in a loop: " in chosen.execution_reason


UNLIKE = {
    "tied weights": (lambda i: tied(), "'2.weight' of member 0 is shared with another member or under another name"),
    "hooks": (lambda i: hooked(), "Linear has forward hooks"),
    "state-dict hooks": (lambda i: named_state(), "Linear has state_dict hooks"),
    "recurrent": (lambda i: nn.LSTM(4, 4), "LSTM is recurrent"),
    "synchronised": (
        lambda i: nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)),
        r"'1' \(SyncBatchNorm\) communicates with other",
    ),
    "cumulative": (lambda i: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), "has momentum=None"),
    "lazy": (lambda i: nn.LazyLinear(4), "'weight' is lazy and was not initialized by a batch"),
    "no parameters": (lambda i: nn.ReLU(), "ReLU has no parameters"),
    "LightningModule": (lambda i: Lit(), "a LightningModule runs its own steps"),
    "spectral norm": (lambda i: parametrizations.spectral_norm(nn.Linear(4, 4)), "ParametrizedLinear is parametrized"),
    "own modes": (lambda i: half_frozen(), r"'1' \(BatchNorm1d\) is not in the mode of the network"),
    "widths": (
        lambda i: MLP(4, 4, hidden_sizes=(4 + i,)),
        r"'0' \(Linear\) of member 1 differs from member 0 in the shape, dtype",
    ),
    "dtypes": (
        lambda i: nn.Linear(4, 4).to([torch.float32, torch.float64][i]),
        "in the shape, dtype, device or requires_grad",
    ),
    "frozen": (
        lambda i: nn.Linear(4, 4).requires_grad_(i == 0),
        "of member 1 differs from member 0 in the shape, dtype",
    ),
    "bias": (lambda i: nn.Linear(4, 4, bias=i == 0), "requires_grad of 'bias'"),
    "depth": (lambda i: MLP(4, 4, hidden_sizes=(4,) * i), "member 1 has other submodules than member 0"),
    "classes": (lambda i: nn.Sequential(nn.Linear(4, 4), [nn.ReLU(), nn.Tanh()][i]), "its class, Tanh instead of ReLU"),
    "modes": (lambda i: nn.Linear(4, 4).train(i == 0), "in its attribute 'training'"),
    "settings": (
        lambda i: MLP(4, 4, hidden_sizes=(4,), dropout=0.1 + i / 2),
        r"'2' \(Dropout\) of member 1 differs .* attribute 'p'",
    ),
    "functions": (lambda i: Custom([torch.relu, torch.tanh][i]), "in its attribute 'then'"),
    "closures": (lambda i: Custom(lambda s, x: x * i), "in its attribute 'then'"),
    "loose tensors": (lambda i: Custom(lambda s, x: x * s.t, t=torch.ones(1)), "in its attribute 't'"),
    "loose tensors in lists": (lambda i: Custom(lambda s, x: x * s.t[0], t=[torch.ones(1)]), "in its attribute 't'"),
    "objects": (lambda i: Custom(lambda s, x: x, t=random.Random(0)), "in its attribute 't'"),
    "extra attributes": (lambda i: Custom(lambda s, x: x, **({"t": 1} if i else {})), "in its attribute 't'"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("execution", ["stacked", "vmap"])
@pytest.mark.parametrize("name", UNLIKE)
def test_members_that_are_not_alike_run_in_a_loop(name, execution):
    make, text = UNLIKE[name]
    with pytest.raises(UnsupportedError, match=text):
        build_ensemble([make(i) for i in range(2)], execution)
    assert build_ensemble([make(i) for i in range(2)]).execution == "loop"


def test_a_shared_part_runs_in_a_loop():
    backbone = nn.Linear(4, 4)
    members = [nn.Sequential(backbone, nn.Linear(4, 2)) for _ in range(2)]
    with pytest.raises(UnsupportedError, match=r"'0.weight' of member 1 is shared with another member"):
        build_ensemble(members, "vmap")
    network = build_ensemble(members)
    assert network.execution == "loop"
    assert len(list(network.parameters())) == 6


def test_members_of_one_lambda_are_alike():
    members = [Custom(lambda s, x, k=2: F.relu(x) * k) for _ in range(3)]
    assert build_ensemble(members).execution == "stacked"


@pytest.mark.parametrize(
    ("make", "num", "execution", "reason"),
    [
        (lambda: MLP(4, 3), 3, "stacked", "Ensemble of 3 runs stacked: its members are alike, and one batched product"),
        (lambda: MLP(4, 3), 1, "loop", "Ensemble of 1 runs in a loop: one member has nothing to share"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 1, 1)),
            2,
            "loop",
            r"in a loop: '0' \(Conv2d\) has no counterpart over stacked",
        ),
        (Lit, 2, "loop", "a LightningModule runs its own steps"),
        (lambda: NetworkWithPrior(MLP(4, 3), MLP(4, 3), 1.0), 2, "stacked", "its members are alike"),
    ],
)
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_auto_chooses_and_says_why(make, num, execution, reason, mixed_precision):
    network = build_ensemble([make() for _ in range(num)], mixed_precision=mixed_precision)
    assert network.execution == execution
    assert type(network) is (StackedEnsembleNetwork if execution == "stacked" else EnsembleNetwork)
    assert re.search(reason, network.execution_reason)
    asked = build_ensemble([make() for _ in range(num)], execution)
    assert asked.execution_reason.endswith(", as asked.")


def test_vmap_is_chosen_for_known_layers_alone():
    """Without a GPU ``auto`` does not ask; what it would ask is here."""
    from lightning_uq.networks.ensemble.vmapped import check_mappable
    from lightning_uq.networks.output import OutputReader

    check_mappable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()), OutputReader())
    with pytest.raises(UnsupportedError, match=r"'1' \(MultiheadAttention\) is not known to work under torch.vmap"):
        check_mappable(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), OutputReader())
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        check_mappable(Custom(lambda s, x: x if x.sum() > 0 else -x), OutputReader())


def test_a_call_that_vmap_cannot_map_is_reported():
    network = build_ensemble([Custom(lambda s, x: x if x.sum().item() > 0 else -x) for _ in range(2)], "vmap")
    with pytest.raises(
        UnsupportedError, match=r"execution='vmap' does not support Custom: .*item\(\).* Use execution='loop'"
    ):
        network(torch.randn(3, 4))


def test_other_errors_of_a_vmapped_member_are_its_own():
    network = build_ensemble([nn.Linear(4, 4) for _ in range(2)], "vmap")
    with pytest.raises(RuntimeError, match="Expected size") as error:
        network(torch.randn(3, 5))
    assert not isinstance(error.value, UnsupportedError)


def test_batch_norm_checks_its_input_as_torch_does():
    network = build_ensemble([nn.BatchNorm1d(4) for _ in range(2)], "stacked")
    with pytest.raises(
        ValueError, match=r"The input of BatchNorm1d must be \[B, C\] or \[B, C, L\], but its shape is \[2, 3, 4, 5\]"
    ):
        network(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        network(torch.zeros(1, 4))


def test_a_prior_of_another_shape_is_told_in_every_execution():
    for execution in ("loop", "stacked", "vmap"):
        network = build_ensemble([NetworkWithPrior(nn.Linear(4, 3), nn.Linear(4, 1), 1.0) for _ in range(2)], execution)
        with pytest.raises(ValueError, match="The prior's output must have the network's shape"):
            network(torch.zeros(5, 4))


def test_the_choice_does_not_depend_on_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert build_ensemble([MLP(4, 3) for _ in range(2)]).execution == "stacked"
    assert build_ensemble([nn.Conv2d(1, 1, 1) for _ in range(2)]).execution == "loop"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_convolutions_on_a_gpu_run_under_vmap():
    members = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).cuda() for _ in range(3)]
    network = build_ensemble(members)
    assert network.execution == "vmap"
    assert build_ensemble(members, mixed_precision=True).execution == "loop"
    x = torch.randn(5, 1, 4, 4, device="cuda")
    torch.testing.assert_close(network(x), build_ensemble(members, "loop")(x), rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert network(x).dtype == build_ensemble(members, "loop")(x).dtype


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # by gradcheck of torch 2.6
@pytest.mark.parametrize("bias", [True, False])
def test_batched_linear_has_first_and_second_gradients(bias):
    shapes = [(2, 3, 4), (2, 5, 4), *([(2, 5)] if bias else [])]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = torch.stack([F.linear(*(t[i] for t in tensors)) for i in range(2)])
    torch.testing.assert_close(linear(*tensors), expected)
    assert torch.autograd.gradcheck(linear, tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(linear, tensors)
    linear(*tensors).sum().backward()
    assert tensors[1].grad.stride() == tensors[1].stride()  # stolen by the parameter, not copied


def test_stacked_networks_work_with_function_transforms():
    network = build_ensemble([MLP(4, 3, hidden_sizes=(5,), activation="tanh") for _ in range(2)], "stacked")
    loop = build_ensemble([network.member(i) for i in range(2)], "loop")
    x = torch.randn(6, 4)
    for call in (torch.func.jacrev, lambda f: torch.vmap(f)):
        torch.testing.assert_close(call(network)(x.clone()), call(loop)(x.clone()))


@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_penalty_agrees_with_the_loop(training):
    network = build_ensemble(
        [MLP(4, 3, hidden_sizes=(5,), activation="tanh", norm="layer") for _ in range(2)], "stacked"
    ).train(training)
    loop = build_ensemble([network.member(i) for i in range(2)], "loop").train(training)
    x = torch.randn(6, 4)
    for net in (network, loop):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    for i in range(2):
        weight = network._parameters["members/0/weight"].grad[i]
        torch.testing.assert_close(weight, loop.members[i][0].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ["loop", "stacked", "vmap"])
def test_integer_inputs_fail_in_every_execution(execution):
    network = build_ensemble([nn.Linear(4, 3) for _ in range(2)], execution)
    with pytest.raises(RuntimeError, match="dtype|type"):
        network(torch.ones(5, 4, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype|type"):
        network(torch.ones(5, 4, dtype=torch.long))
