import copy
import hashlib

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_uq.networks import fingerprint
from lightning_uq.networks.fingerprint import DTYPES, same_weights, weights_fingerprint
from tests.counting import peak_bytes


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def matches(before: torch.Tensor, module: nn.Module) -> bool:
    return same_weights(before, weights_fingerprint(module), module)


def test_a_copy_has_the_same_and_another_seed_has_not():
    net = network()
    before = weights_fingerprint(net)
    assert matches(before, copy.deepcopy(net))
    assert not matches(before, network(1))


def test_one_ulp_two_swapped_rows_and_a_buffer_change_it():
    before = weights_fingerprint(network())
    net = network()
    net[0].weight.data[0, 0] = torch.nextafter(net[0].weight.data[0, 0], torch.tensor(9.0))
    assert not matches(before, net)
    net = network()
    net[0].weight.data = net[0].weight.data[[1, 0, 2, 3]]
    assert not matches(before, net)
    net = network()
    net[1].running_mean += 0.1
    assert not matches(before, net)
    net = network()
    net[1].num_batches_tracked += 1
    assert not matches(before, net)


def test_the_same_values_under_two_names_swapped_change_it():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    swapped = nn.ModuleDict({"a": net["b"], "b": net["a"]})
    assert not matches(weights_fingerprint(net), swapped)


# bfloat16 and float16 are left out as a pair: neither holds the other's values.
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if {a, b} != {torch.bfloat16, torch.float16}]


@pytest.mark.parametrize(("fitted", "tested"), PAIRS)
def test_a_change_of_precision_is_tolerated(fitted, tested):
    net = network().to(fitted)
    before = weights_fingerprint(net)
    assert matches(before, copy.deepcopy(net).to(tested))
    assert not matches(before, network(1).to(tested))


def test_compiling_and_metrics_do_not_change_it():
    net = network()
    before = weights_fingerprint(net)
    assert matches(before, torch.compile(net, backend="eager"))
    net.metric = MeanMetric()
    net.metric.persistent(True)
    net.metric.update(3.0)
    assert matches(before, net)


def test_non_persistent_buffers_are_left_out():
    net = network()
    before = weights_fingerprint(net)
    net.register_buffer("cache", torch.ones(3), persistent=False)
    assert matches(before, net)


def test_it_is_the_sum_that_files_hold_whatever_the_pieces_and_the_layout(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)
    net.register_buffer("turned", torch.randn(7, 4).T)
    expected = torch.zeros(4, dtype=torch.int64)
    for name, tensor in net.state_dict(prefix=".").items():
        name = name[1:] if "." in name[1:] else name
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        position = torch.arange(1, tensor.numel() + 1) * -7046029254386353131
        position ^= position >> 29
        for i, dtype in enumerate(DTYPES):
            bits = tensor.flatten()
            if tensor.is_floating_point():
                bits = bits.to(dtype).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
            expected[i] += ((bits.long() * position).sum() + bits.long().sum()) * (salt | 1)
    for size in (2**19, 7, 1):
        monkeypatch.setattr(fingerprint, "_PIECE", size)
        assert torch.equal(weights_fingerprint(net), expected)


def test_small_complex_values_count():
    net = nn.Module()
    net.register_buffer("phases", torch.tensor([0.1 + 0.2j, 0.3j]))
    before = weights_fingerprint(net)
    assert matches(before, net)
    net.phases[1] += 0.1
    assert not matches(before, net)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_its_memory_does_not_grow_with_the_largest_tensor(layout):
    def peak(size):
        net = nn.Linear(2**10, size // 2**10, bias=False).double()
        if layout == "columns":
            net.weight.data = net.weight.data.T.contiguous().T
        return peak_bytes(lambda: same_weights(weights_fingerprint(net), weights_fingerprint(net), net))

    assert peak(2**21) < 1.1 * peak(2**20) < 64 * 2**20
