import copy

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.dropout import DropoutNetwork

X = torch.randn(6, 20)


def base(rate=0.5):
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Dropout(rate), nn.Linear(40, 3))


def test_the_mask_belongs_to_the_index_and_is_shared_by_the_batch():
    inner = base()
    network = DropoutNetwork(inner)
    z = torch.tensor([5, 9])
    output = network(X, z)
    h = inner[1](inner[0](X))
    mask = network.mask_of(z, 0, torch.Size([1, 40]), 0.5)
    expected = torch.stack([inner[3](h * mask[i] / 0.5) for i in range(2)])
    torch.testing.assert_close(output, expected)
    # An input's output depends on its index alone: not on the batch, the mode, or the other indices.
    torch.testing.assert_close(network.eval()(X[2:3], z[1:])[0, 0], output[1, 2])
    torch.testing.assert_close(network(X[[4, 2]], z.flip(0))[0, 1], output[1, 2])


def test_per_example_masks_differ_by_row():
    row = X[:1].expand(4, -1)
    shared, own = DropoutNetwork(base()), DropoutNetwork(base(), mask="per_example")
    z = torch.tensor([1])
    torch.testing.assert_close(shared(row, z)[0], shared(row, z)[0, :1].expand(4, -1))
    outputs = own(row, z)[0]
    assert ((outputs[:, None] - outputs).abs().amax(2) > 1e-3).sum() == 4 * 3
    assert torch.equal(own(row, z), own(row, z))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_masks_are_independent_and_of_the_right_rate(rate):
    network = DropoutNetwork(base())
    size = torch.Size([1, 300])
    masks = torch.stack([network.mask_of(torch.arange(400), layer, size, rate) for layer in (0, 1)]).double()
    deviation = masks - (1 - rate)
    variance = rate * (1 - rate)
    count = masks.numel() ** 0.5
    assert abs(deviation.mean()) < 4 * variance**0.5 / count
    for one, other in [  # neighbours in layer, index and unit
        (deviation[0], deviation[1]),
        (deviation[:, 1:], deviation[:, :-1]),
        (deviation[..., 1:], deviation[..., :-1]),
    ]:
        assert abs((one * other).mean()) < 5 * variance / one.numel() ** 0.5


def test_the_mean_over_masks_is_the_network_without_dropout_where_it_is_linear():
    inner = nn.Sequential(nn.Dropout(0.4), nn.Linear(20, 3))
    network = DropoutNetwork(inner).eval()
    output = network(X, network.evaluation_index(20_000)).mean(0)
    torch.testing.assert_close(output, inner[1](X), atol=0.06, rtol=0)


def test_channelwise_dropout_drops_channels():
    inner = nn.Sequential(nn.Dropout2d(0.5))
    output = DropoutNetwork(inner)(torch.ones(3, 8, 4, 4), torch.arange(5))
    per_channel = output.flatten(3)
    assert ((per_channel == 0).all(3) | (per_channel == 2).all(3)).all()
    assert 0.2 < (per_channel[..., 0] == 0).float().mean() < 0.8


def test_a_layer_called_twice_has_two_masks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return torch.stack([self.drop(x), self.drop(x)], 1)

    output = DropoutNetwork(Twice())(torch.ones(1, 200), torch.tensor([0]))[0, 0]
    assert not torch.equal(output[0], output[1])


@pytest.mark.parametrize("limit", ["_MAX_ROWS_CPU", "_MAX_NUMBERS"])
def test_chunks_make_no_difference(monkeypatch, limit):
    network = DropoutNetwork(base()).eval()
    z = network.evaluation_index(11)
    network(X, z)  # looks at its dropouts
    passes = []
    network.network.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    whole = network(X, z)
    assert passes == [11 * len(X)]
    passes.clear()
    monkeypatch.setattr(
        f"lightning_uq.networks.dropout.network.{limit}", 2 * (X.numel() if limit == "_MAX_NUMBERS" else len(X))
    )
    torch.testing.assert_close(network(X, z), whole)
    assert passes == [2 * len(X)] * 5 + [len(X)]


def test_modes_are_left_as_they_were_and_no_random_state_is_used():
    network = DropoutNetwork(base())
    state = torch.get_rng_state()
    network(X, torch.arange(3))
    assert network.network[2].training
    assert torch.equal(torch.get_rng_state(), state)
    network.eval()
    network(X, torch.arange(3))
    assert not network.network[2].training
    # On its own, the inner network is as it was.
    assert torch.equal(network.network(X), network.network(X))


def test_gradients_flow_through_the_kept_units():
    network = DropoutNetwork(base(0.9))
    z = torch.tensor([3])
    network(X, z).sum().backward()
    kept = network.mask_of(z, 0, torch.Size([1, 40]), 0.9)[0, 0]
    gradient = network.network[3].weight.grad.abs().sum(0)
    assert (gradient[~kept] == 0).all()


def test_copy_and_export():
    network = DropoutNetwork(base()).eval()
    z = network.evaluation_index(4)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(X, z), network(X, z))
    program = torch.export.export(network, (X, z), strict=False)
    torch.testing.assert_close(program.module()(X, z), network(X, z))


def test_bad_arguments():
    with pytest.raises(InputError, match="`nn.Dropout` layers"):
        DropoutNetwork(nn.Linear(2, 3))
    with pytest.raises(InputError, match="none with p > 0"):
        DropoutNetwork(base(0.0))
    with pytest.raises(InputError, match="`mask`"):
        DropoutNetwork(base(), mask="rows")
    with pytest.raises(UnsupportedError, match="AlphaDropout"):
        DropoutNetwork(nn.Sequential(nn.AlphaDropout(0.5)))
    with pytest.raises(InputError, match="`index`"):
        DropoutNetwork(base())(X, torch.randn(3))
    with pytest.raises(InputError, match="`num_samples`"):
        DropoutNetwork(base()).evaluation_index(0)
