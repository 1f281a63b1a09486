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


LIMITS = {"_MAX_ROWS_CPU": "lightning_uq.networks.chunks", "_MAX_NUMBERS": "lightning_uq.networks.dropout.network"}


def passes_of(network, x, z, limit, monkeypatch):
    """Rows of each pass with room for twelve rows at once, whose outputs equal those of one pass."""
    network(x, z)  # looks at its dropouts
    passes = []
    network.network.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    whole = network(x, z)
    assert passes == [len(z) * len(x)]
    passes.clear()
    size = x[0].numel() if network._plan.row_size == 1 else network._plan.row_size
    monkeypatch.setattr(f"{LIMITS[limit]}.{limit}", 12 * (size if limit == "_MAX_NUMBERS" else 1))
    torch.testing.assert_close(network(x, z), whole)
    return passes


@pytest.mark.parametrize("limit", LIMITS)
def test_chunks_of_indices_make_no_difference(monkeypatch, limit):
    network = DropoutNetwork(base(), mask="per_example").eval()
    z = network.evaluation_index(11)
    network(X, z)
    network._plan = network._plan._replace(row_size=1)
    assert passes_of(network, X, z, limit, monkeypatch) == [2 * len(X)] * 5 + [len(X)]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("num_indices", "expected"), [(5, [10, 10, 10]), (30, [12, 12, 6] * len(X))])
def test_chunks_of_rows_make_no_difference(monkeypatch, limit, num_indices, expected):
    network = DropoutNetwork(base()).eval()
    assert passes_of(network, X, network.evaluation_index(num_indices), limit, monkeypatch) == expected


class Bypassed(nn.Module):
    """A dropout that a residual connection bypasses."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.drop(h))


class Untraceable(nn.Module):
    """A forward pass with a branch that depends on values, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.network = base()

    def forward(self, x):
        return self.network(x if bool(x.isfinite().all()) else torch.zeros_like(x))


class Viewed(nn.Module):
    """The shape of the output is taken from the input."""

    def __init__(self):
        super().__init__()
        self.network = base()

    def forward(self, x):
        return self.network(x).view(x.shape[0], 3)


class Mixing(nn.Module):
    """Rows depend on the other rows of the batch."""

    def __init__(self):
        super().__init__()
        self.network = base()

    def forward(self, x):
        return self.network(x - x.mean(0))


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (base, len(X)),
        (lambda: nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.0), base()), len(X)),
        (lambda: nn.Sequential(nn.Linear(20, 20), Bypassed()), 7 * len(X)),
        (lambda: nn.Sequential(nn.Linear(20, 20), Untraceable()), 7 * len(X)),
        (lambda: nn.Sequential(nn.Linear(20, 20), Viewed()), 7 * len(X)),
        (lambda: nn.Sequential(nn.Linear(20, 20), Mixing()), 7 * len(X)),
    ],
)
@pytest.mark.parametrize("mask", ["shared", "per_example"])
def test_layers_before_the_first_dropout_run_once_where_nothing_bypasses_it(monkeypatch, make, rows, mask):
    inner = make().double()
    network = DropoutNetwork(inner, mask=mask).eval()
    z, x = torch.arange(7), X.double()
    network(x, z)
    seen = []
    inner[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    output = network(x, z)
    assert sum(seen) == rows
    network._plan = network._plan._replace(shares_trunk=False)
    torch.testing.assert_close(output, network(x, z))


class Keeping(nn.Module):
    """A network that keeps its features, as one does to look at them later."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(8, 3))
        self.kept = []

    def forward(self, x):
        self.kept.append(self.features(x))
        return self.head(self.kept[-1])


@pytest.mark.parametrize("hooked", [False, True])
def test_what_a_network_keeps_are_tensors_alone(hooked):
    inner, seen = Keeping(), []
    if hooked:
        inner.features.register_forward_hook(lambda module, args, output: seen.append(output))
    network = DropoutNetwork(inner).eval()
    with torch.no_grad():
        network(torch.randn(5, 4), network.sample_index(3))
    assert network._plan.shares_trunk is not hooked
    assert {type(one) for one in (*inner.kept, *seen)} == {torch.Tensor}


def test_a_trunk_is_not_shared_if_the_first_rows_cannot_tell_whether_rows_depend_on_one_another():
    for x in (X[:1], X[:1].expand(6, -1)):
        network = DropoutNetwork(nn.Sequential(nn.Linear(20, 20), Mixing())).eval()
        network(x, torch.arange(3))
        assert not network._plan.shares_trunk


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
