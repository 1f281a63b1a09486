import copy

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.features import OUTPUT, FeatureTap, last_layer, traced_last_layer

X = torch.randn(5, 4)


class TwoHeads(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(4, 6), nn.Linear(4, 6)
        self.mean, self.variance = nn.Linear(6, 1), nn.Linear(6, 1)
        self.shared = shared

    def forward(self, x):
        h = self.body(x).relu()
        return torch.cat([self.mean(h), self.variance(h if self.shared else self.other(x).relu())], 1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x) if x.sum() > 0 else self.head(-x)


@pytest.mark.parametrize(
    ("network", "name", "size"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2", 3),
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LogSoftmax(1)), "2", None),
        (TwoHeads(shared=True), "variance", None),
        (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 8, 1), nn.ReLU(), nn.Conv1d(8, 3, 1)), "3", 3),
        (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 8, 1), nn.Flatten(), nn.Linear(32, 3)), "3", 3),
    ],
)
def test_the_graph_and_the_gradient_find_the_same_layer(network, name, size):
    found = traced_last_layer(network)
    assert found is not None
    assert found[1] == size
    assert last_layer(network, lambda: network(X)) == name
    layers = dict(network.named_modules())
    assert layers[found[0]].weight.shape == layers[name].weight.shape


def test_what_the_graph_does_not_tell():
    assert traced_last_layer(Branching()) is None  # no graph
    assert traced_last_layer(TwoHeads(shared=False)) is None  # two inputs
    assert traced_last_layer(nn.MaxPool2d(3)) is None  # no layer with weights
    network = TwoHeads(shared=False)
    with pytest.raises(InputError, match="Several layers"):
        last_layer(network, lambda: network(X), "feature_layers")
    with pytest.raises(InputError, match="feature_layers='auto'"):
        last_layer(nn.ReLU(), lambda: X, "feature_layers")


def test_a_tap_gives_inputs_in_order_and_holds_nothing_afterwards():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    tap = FeatureTap(network, ["2", "0", OUTPUT])
    output, (hidden, x, logits) = tap.run(network, X)
    torch.testing.assert_close(hidden, network[:2](X))
    assert torch.equal(x, X)
    assert torch.equal(logits, output)
    assert output.requires_grad
    assert not hidden.requires_grad
    network(X)
    assert tap.caught is None
    copies = copy.deepcopy((network, tap))
    with torch.no_grad():
        copies[0][0].weight.zero_()
    assert not torch.equal(copies[1].run(copies[0], X)[1][0], hidden)


def test_layers_that_are_not_there_or_not_run():
    network = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(InputError, match="`feature_layers`.*it is 'fc'"):
        FeatureTap(network, ["fc"])
    idle = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)})
    idle.forward = lambda x: idle["used"](x)
    with pytest.raises(InputError, match="'idle' was not called"):
        FeatureTap(idle, ["idle"]).run(idle, X)
    # After an error the next call is as any other.
    tap = FeatureTap(network, ["0"])
    with pytest.raises(RuntimeError):
        tap.run(network, torch.zeros(2, 9))
    assert torch.equal(tap.run(network, X)[1][0], X)


class HeadsOn(nn.Module):
    """Two heads of one size, whose inputs a function makes of the hidden units."""

    def __init__(self, inputs) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.inputs = inputs

    def forward(self, x):
        first, second = self.inputs(self.body(x).relu())
        return self.a(first).sum(0, keepdim=True) + self.b(second() if callable(second) else second)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda h: (h, h[:3]),
        lambda h: (h[::2], h[:3]),
        lambda h: (h, h.unsqueeze(0)),
        lambda h: (h, lambda: h.mul_(2)),
    ],
    ids=["a slice", "another stride", "another shape", "changed in place"],
)
def test_inputs_that_begin_at_one_address_are_not_one_input(inputs):
    network = HeadsOn(inputs).eval()
    with pytest.raises(InputError, match="Several layers with different inputs .* 'a', 'b'"):
        last_layer(network, lambda: network(torch.randn(6, 4)))


def test_two_heads_on_one_input_are_one():
    for same in (
        lambda h: (h, h),
        lambda h: (h, nn.functional.dropout(h, training=False)),
        lambda h: (h, h.view(6, 8)),
    ):
        network = HeadsOn(same)
        assert last_layer(network, lambda: network(torch.randn(6, 4))) == "b"  # noqa: B023
    with torch.inference_mode():
        x = torch.randn(5, 4)
    frozen = nn.Linear(4, 3).requires_grad_(False)
    assert last_layer(frozen, lambda: frozen(x)) == ""


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(input=self.body(input=x).relu())


def test_a_layer_may_be_called_by_name():
    network = ByName()
    assert last_layer(network, lambda: network(X)) == "head"
    assert traced_last_layer(network) == ("head", 3)
    output, (hidden, x) = FeatureTap(network, ["head", "body"]).run(network, X)
    torch.testing.assert_close(hidden, network.body(X).relu())
    assert torch.equal(x, X)
    assert output.shape == (5, 3)


def test_a_network_that_was_compiled_and_called_before_is_tapped_too():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        compiled(X)  # from now on, it runs without hooks that it does not know
        output, (features,) = FeatureTap(compiled, ["2"]).run(compiled, X)
        torch.testing.assert_close(features, network[:2](X))
        torch.testing.assert_close(output, network(X))
