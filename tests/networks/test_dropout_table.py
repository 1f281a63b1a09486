"""Every way in which a network may drop, and what happens to it."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from lightning_uq import DropoutModule
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.dropout import DropoutNetwork
from lightning_uq.networks.dropout.attention import attend

T, D, CLASSES = 5, 8, 3
X = torch.randn(6, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = torch.arange(7)


class Pooled(nn.Module):
    """A layer on [B, T, D], and a head on the mean over T."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Attention(nn.Module):
    """As a user writes it: the rate is 0 in evaluation."""

    def __init__(self, **options):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.options = options

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, D // 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        rate = 0.4 if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, **self.options)
        return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.4, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class TimeMajor(nn.Module):
    """A layer that wants [T, B, D], with dropout behind it."""

    def __init__(self, layer, drop):
        super().__init__()
        self.inner, self.drop = layer, drop

    def forward(self, x):
        found = self.inner(x.transpose(0, 1))
        return self.drop(found[0] if isinstance(found, tuple) else found).transpose(0, 1)


class Table(nn.Module):
    """Dropout of a table of positions, which has no batch axis, or one of size 1."""

    def __init__(self, *shape):
        super().__init__()
        self.table, self.drop = nn.Parameter(torch.randn(*shape)), nn.Dropout(0.4)

    def forward(self, x):
        return x + self.drop(self.table)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.4), nn.Linear(D, D)

    def forward(self, x):
        return self.drop(self.linear(self.drop(x)))


class Windows(nn.Module):
    """Axis 0 holds batch and positions, the batch outermost."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        return self.drop(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FlatTimeMajor(nn.Module):
    """Axis 0 holds positions and batch, the positions outermost."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        flat = x.transpose(0, 1).flatten(0, 1)
        return self.drop(flat).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def encoder(**options):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.4, **options), 2, enable_nested_tensor=False
    )


VARY = {
    "nn.Dropout": lambda: nn.Dropout(0.4),
    "nn.Dropout, in place": lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.4, inplace=True)),
    "nn.Dropout1d": lambda: nn.Dropout1d(0.4),
    "nn.Dropout called twice": Twice,
    "nn.Dropout of windows": Windows,
    "nn.Dropout of a flat time-major input": FlatTimeMajor,
    "nn.Dropout of a table [T, D]": lambda: Table(T, D),
    "nn.Dropout of a table [1, T, D]": lambda: Table(1, T, D),
    "nn.Dropout of a table [Z, D]": lambda: Function(lambda self, x: x + self.drop(self.table).sum(0)),
    "F.dropout(training=self.training)": lambda: Function(lambda self, x: F.dropout(x, 0.4, self.training)),
    "F.dropout(training=True)": lambda: Function(lambda self, x: F.dropout(x, p=0.4)),
    "F.dropout(p=0.4 if self.training else 0)": lambda: Function(
        lambda self, x: F.dropout(x, p=0.4 if self.training else 0.0, training=self.training)
    ),
    "F.dropout, in place": lambda: Function(lambda self, x: F.dropout(x.clone(), 0.4, self.training, True)),
    "torch.dropout": lambda: Function(lambda self, x: torch.dropout(x, 0.4, self.training)),
    "F.dropout1d": lambda: Function(lambda self, x: F.dropout1d(x, 0.4, self.training)),
    "scaled_dot_product_attention": Attention,
    "scaled_dot_product_attention, causal": lambda: Attention(is_causal=True, scale=0.3),
    "nn.MultiheadAttention": lambda: SelfAttention(batch_first=True),
    "nn.MultiheadAttention, time-major": lambda: TimeMajor(SelfAttention(), nn.Identity()),
    "nn.TransformerEncoder": lambda: encoder(batch_first=True),
    "nn.TransformerEncoder, time-major": lambda: TimeMajor(encoder(), nn.Identity()),
    "nn.GRU, time-major, nn.Dropout behind": lambda: TimeMajor(nn.GRU(D, D), nn.Dropout(0.4)),
    "nn.GRU, time-major, T = Z": lambda: Function(lambda self, x: self.time_major(x.repeat(1, 2, 1)[:, : len(Z)])),
}


def network(name):
    torch.manual_seed(1)
    layer = VARY[name]()
    if name == "nn.Dropout of a table [Z, D]":
        layer.drop, layer.table = nn.Dropout(0.4), nn.Parameter(torch.randn(len(Z), D))
    if name == "nn.GRU, time-major, T = Z":
        layer.time_major = TimeMajor(nn.GRU(D, D), nn.Dropout(0.4))
    return Pooled(layer).double()


@pytest.mark.parametrize("name", VARY)
def test_what_varies_with_the_index(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        driven = DropoutNetwork(network(name)).eval()
        with torch.no_grad():
            whole = driven(X, Z)
    assert whole.shape == (len(Z), len(X), CLASSES)
    assert (whole.std(0) > 1e-4).all()
    assert len(torch.unique(whole[:, 0, 0])) >= (5 if "1d" in name else len(Z))  # five channels have 32 masks
    with torch.no_grad():
        # A row alone is the row in a batch, at any size; an index alone is the index among others.
        for rows in ([0], [3], [4, 2], [5, 5, 5, 1]):
            torch.testing.assert_close(driven(X[rows], Z), whole[:, rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(driven(X, Z[2:3]), whole[2:3], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(driven(X, Z.flip(0)), whole.flip(0), rtol=1e-9, atol=1e-9)
        large = X.repeat(300, 1, 1)  # in several passes
        torch.testing.assert_close(driven(large, Z)[:, :6], whole, rtol=1e-9, atol=1e-9)
    # The same masks in training, and no random state is used.
    state = torch.get_rng_state()
    torch.testing.assert_close(driven.train()(X, Z), whole, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", VARY)
def test_the_mean_of_many_is_near_the_network_without_masks_and_gradients_flow(name):
    driven = DropoutNetwork(network(name))
    out = driven(X, torch.arange(3))
    out.sum().backward()
    assert driven.network.head.weight.grad.isfinite().all()
    if (
        name == "F.dropout(training=True)"
        or "GRU" in name
        or "Transformer" in name
        or "twice" in name
        or "Attention" in name
        or "attention" in name
    ):
        return  # not linear in the masks, or random without them
    with torch.no_grad():
        mean = driven.eval()(X, torch.arange(3000)).mean(0)
        plain = driven.network.eval()(X)
    scale = 3 * plain.abs().mean()
    assert (mean - plain).abs().max() < 0.1 * max(1.0, scale)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.drop = nn.LSTM(D, D, 2, dropout=0.4, batch_first=True), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.lstm(x)[0])


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.forgotten = nn.Dropout(0.1), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x)


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.3

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class ForgottenOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.drop = SelfAttention(batch_first=True), nn.Dropout(0.5)
        self.attention.attention.dropout = 0.0

    def forward(self, x):
        return self.attention(x)


WARNED = {
    "nn.LSTM(dropout=)": (Lstm, r"dropout inside layer.lstm \(LSTM\) does not depend on the index"),
    "never called": (Uncalled, r"Dropout layers \['layer.forgotten'\] are never called"),
    "stochastic depth": (
        lambda: nn.Sequential(nn.Dropout(0.1), StochasticDepth(0.3, "row")),
        r"dropout inside layer.1 \(StochasticDepth\)",
    ),
    "drop path": (lambda: nn.Sequential(nn.Dropout(0.1), DropPath()), r"dropout inside layer.1 \(DropPath\)"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_does_not_vary_is_named_once(name):
    make, message = WARNED[name]
    driven = DropoutNetwork(Pooled(make()).double()).eval()
    with pytest.warns(UserWarning, match=message):
        driven(X, Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        driven(X, Z)


def test_rates_that_cannot_be_read_are_told_with_the_reason():
    class NeedsTargets(Attention):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets are needed in training")
            return super().forward(x)

    driven = DropoutNetwork(Pooled(nn.Sequential(nn.Dropout(0.1), NeedsTargets())).double()).eval()
    with pytest.warns(
        UserWarning,
        match="are unknown: its forward raised ValueError: targets are needed in training. These dropouts",
    ):
        driven(X, Z)


def test_hypotheses_that_do_not_vary_at_all_are_told():
    driven = DropoutNetwork(Pooled(ForgottenOnly()).double()).eval()
    with pytest.raises(InputError, match="must have dropout with a rate above 0, but Pooled calls no"):
        driven(X, Z)
    behind = Pooled(nn.Sequential(nn.Dropout(0.5), Function(lambda self, x: 0 * x))).double()
    with pytest.warns(UserWarning, match="hypotheses of Pooled do not vary"):
        DropoutNetwork(behind).eval()(X, Z)


def test_a_network_whose_only_dropout_is_inside_a_recurrent_layer_is_told_of_it():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.head = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.reader(x)[0][:, -1])

    with pytest.raises(
        InputError,
        match=r"Reader calls no `nn.Dropout` layer.* The dropout inside reader \(LSTM\) cannot be controlled",
    ):
        DropoutNetwork(Reader()).eval()(torch.zeros(6, 5, 4), Z)


def test_a_network_without_dropout_is_refused_before_a_step(make_trainer):
    module = DropoutModule(Pooled(Function(lambda self, x: x)))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(6).long()), batch_size=3)
    before = module.network.network.head.weight.detach().clone()
    with pytest.raises(InputError, match="calls no `nn.Dropout` layer, no `F.dropout`, and no attention"):
        make_trainer(precision="64-true").fit(module, data)
    assert torch.equal(module.network.network.head.weight, before.double())


@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout_is_refused(function):
    driven = DropoutNetwork(Pooled(Function(lambda self, x: function(x, 0.3, self.training)))).eval()
    with pytest.raises(UnsupportedError, match="does not support alpha dropout"):
        driven(X.float(), Z)


def test_a_compiled_network_hides_function_calls():
    inner = torch.compile(Pooled(Function(lambda self, x: F.dropout(x, 0.4, self.training))), backend="eager")
    with pytest.raises(UnsupportedError, match="is compiled, but has dropouts that are function calls"):
        DropoutNetwork(inner).eval()(X.float(), Z)


def test_the_look_at_the_first_batch_leaves_the_network_as_it_was():
    norm = nn.BatchNorm1d(T)
    norm.eval()
    inner = Pooled(nn.Sequential(nn.Dropout(0.4), norm, Attention())).double()
    driven = DropoutNetwork(inner)
    modes = [module.training for module in inner.modules()]
    state = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    driven(X, Z[:1])
    assert [module.training for module in inner.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in inner.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "mask", [None, torch.tril(torch.ones(T, T, dtype=torch.bool)), torch.randn(T, T, dtype=torch.float64)]
)
@pytest.mark.parametrize("options", [{}, {"scale": 0.2}, {"enable_gqa": True}])
def test_attention_is_torch_s(mask, options):
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = (torch.randn(3, n, T, D, dtype=torch.float64) for n in (4, heads, heads))
    expected = F.scaled_dot_product_attention(q, k, v, mask, **options)
    torch.testing.assert_close(attend(q, k, v, mask, False, lambda weights: weights, **options), expected)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    torch.testing.assert_close(attend(q, k, v, None, True, lambda weights: weights, **options), causal)
    assert math.isfinite(float(expected.sum()))


@pytest.mark.parametrize(
    "name", ["F.dropout(training=self.training)", "scaled_dot_product_attention", "nn.TransformerEncoder"]
)
def test_functions_export(name):
    driven = DropoutNetwork(network(name)).eval()
    with torch.no_grad():
        expected = driven(X, Z)
        program = torch.export.export(driven, (X, Z), strict=False)
        torch.testing.assert_close(program.module()(X, Z), expected)
