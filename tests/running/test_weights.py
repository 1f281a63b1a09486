"""A mark of weights that is cheap, and never says that changed weights are the same."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_uq.networks.fingerprint import weights_fingerprint
from lightning_uq.running import weights
from lightning_uq.running.weights import WeightsCheck, weights_mark


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def in_place(net):
    with torch.no_grad():
        net[0].weight.mul_(2)


def in_inference_mode(net):
    with torch.inference_mode():
        net[0].weight.mul_(2)


def past_the_version_counter(net):
    """As Lightning swaps averaged weights."""
    for parameter in net.parameters():
        parameter.data.copy_(2 * parameter.data + 1)


def one_layers_data(net):
    net[2].weight.data = 2 * net[2].weight.data


def twice_replaced(net):
    """The second storage may lie at the address of the first one."""
    net[0].weight.data = torch.zeros(4, 3)
    net[0].weight.data = torch.ones(4, 3)


def replaced(net):
    net[2] = nn.Linear(4, 2)


def a_statistic(net):
    net(torch.randn(5, 3))


def a_state_dict(net):
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_inference_mode,
        past_the_version_counter,
        one_layers_data,
        twice_replaced,
        replaced,
        a_statistic,
        a_state_dict,
    ],
    ids=lambda change: change.__name__,
)
def test_every_change_is_noticed(change):
    net = network()
    check = WeightsCheck(weights_fingerprint(net))
    assert check(net)
    change(net)
    assert not check(net)


WIDE = {"rows": 64, "columns": 96}  # six blocks


def one_number(data):
    data[3, 5] += 1e-6


def two_rows_swapped(data):
    data[[2, 40]] = data[[40, 2]]


def two_neighbours_swapped(data):
    data[1, [7, 8]] = data[1, [8, 7]]


def clamped(data):
    data.clamp_(-0.01, 0.01)


def merged_adapter(data):
    data += 1e-3 * torch.randn(len(data), 2) @ torch.randn(2, data.shape[1])


def through_numpy(data):
    data.numpy()[0, 0] = 7


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize(
    "write",
    [one_number, two_rows_swapped, two_neighbours_swapped, clamped, merged_adapter, through_numpy],
    ids=lambda write: write.__name__,
)
def test_every_write_past_the_version_counters_is_noticed_in_every_layer(write, layer):
    net = nn.Sequential(*(nn.Linear(WIDE["columns"], WIDE["rows"]) for _ in range(6)))
    check = WeightsCheck(weights_fingerprint(net))
    assert check(net)
    version = net[layer].weight._version
    write(net[layer].weight.data)
    assert net[layer].weight._version == version
    assert not check(net)


def test_weights_of_any_type_have_a_mark():
    net = nn.Module()
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8, torch.int64)
    for i, dtype in enumerate(kinds):
        net.register_buffer(f"of_kind_{i}", torch.ones(2, 700).to(dtype))
    net.register_buffer("empty", torch.empty(0, 3))
    net.register_buffer("scalar", torch.tensor(1.0))
    net.register_buffer("transposed", torch.randn(40, 50).T)
    for name in [name for name, buffer in net.named_buffers() if buffer.numel()]:
        before = weights_mark(net)
        assert before == weights_mark(net)
        buffer = net.get_buffer(name)
        buffer.data.view(-1)[:1].zero_() if buffer.is_contiguous() else buffer.data[:1, :1].zero_()
        assert before != weights_mark(net), name


@pytest.mark.parametrize("same", [lambda net: net.bfloat16(), lambda net: net.eval(), copy.deepcopy], ids=range(3))
def test_the_same_weights_elsewhere_or_in_less_precision_are_recognised(same):
    net = network()
    check = WeightsCheck(weights_fingerprint(net))
    assert check(net)
    assert check(same(net))


def test_a_swap_and_its_return_are_recognised():
    net = network()
    check = WeightsCheck(weights_fingerprint(net))
    before = copy.deepcopy(net.state_dict())
    in_place(net)
    assert not check(net)
    net.load_state_dict(before)
    assert check(net)


def test_the_fingerprint_is_taken_only_after_a_change(monkeypatch):
    net, taken = network().eval(), []
    check = WeightsCheck(weights_fingerprint(net))
    monkeypatch.setattr(weights, "weights_fingerprint", lambda module: taken.append(1) or weights_fingerprint(module))
    for _ in range(3):
        net(torch.randn(5, 3))
        assert check(net)
    assert len(taken) == 1
    in_place(net)
    check(net)
    assert len(taken) == 2


def test_inference_tensors_have_no_mark_and_are_compared_every_time():
    with torch.inference_mode():
        net = network()
    check = WeightsCheck(weights_fingerprint(net))
    assert weights_mark(net) is None
    assert check(net)
    with torch.inference_mode():
        net[0].weight.mul_(2)
    assert not check(net)


def test_what_was_accepted_counts_until_it_changes_and_does_not_travel():
    net, other = network(), nn.Linear(2, 2)
    check = WeightsCheck(weights_fingerprint(other))
    check.accept(net)
    assert check(net)
    assert not pickle.loads(pickle.dumps(check))(net)
    in_place(net)
    assert not check(net)
